"""python launch/index.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from retrieval.search.cli import index_main

if __name__ == "__main__":
    raise SystemExit(index_main())

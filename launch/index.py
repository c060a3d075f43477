"""python launch/index.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from retrieval.search.index import main

if __name__ == "__main__":
    raise SystemExit(main())

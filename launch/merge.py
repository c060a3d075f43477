"""python launch/merge.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from retrieval.export.merge import main

if __name__ == "__main__":
    raise SystemExit(main())

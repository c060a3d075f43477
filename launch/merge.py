"""python launch/merge.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from retrieval.export.cli import merge_main

if __name__ == "__main__":
    raise SystemExit(merge_main())

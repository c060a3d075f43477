"""python launch/export.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from retrieval.export.cli import export_main

if __name__ == "__main__":
    raise SystemExit(export_main())

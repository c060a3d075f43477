"""python launch/export.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from lodestar.commands import end
from retrieval.export.cli import export_main

if __name__ == "__main__":
    end(export_main())

"""python launch/merge.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from lodestar.commands import end
from retrieval.export.cli import merge_main

if __name__ == "__main__":
    end(merge_main())

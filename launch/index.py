"""python launch/index.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from lodestar.commands import end
from retrieval.search.cli import index_main

if __name__ == "__main__":
    end(index_main())

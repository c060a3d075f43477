"""python launch/evaluate.py --config FILE [KEY=VALUE ...] [--plan [WORLD_SIZE]] [--json]"""

from lodestar.commands import end
from retrieval.evaluation.cli import main

if __name__ == "__main__":
    end(main())

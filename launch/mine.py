"""python | torchrun launch/mine.py --config FILE [KEY=VALUE ...]: hard negatives for a training file."""

from lodestar.commands import end
from retrieval.mining.cli import main

if __name__ == "__main__":
    end(main())

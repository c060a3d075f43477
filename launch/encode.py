"""python | torchrun launch/encode.py --config FILE [KEY=VALUE ...]: embeddings of a corpus, on all devices."""

from lodestar.commands import end
from retrieval.embedding.cli import main

if __name__ == "__main__":
    end(main())

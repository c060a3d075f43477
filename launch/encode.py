"""python | torchrun launch/encode.py --config FILE [KEY=VALUE ...]: embeddings of a corpus, on all devices."""

from retrieval.embedding.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

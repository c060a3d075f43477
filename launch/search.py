"""python launch/search.py --model FOLDER [--corpus FILE_OR_FOLDER] [--top 5] "shuffle the rows of a tensor" ..."""

from contrastive.search import main

if __name__ == "__main__":
    raise SystemExit(main())

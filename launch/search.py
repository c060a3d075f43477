"""python launch/search.py --model FOLDER [--corpus FILE_OR_FOLDER] [--top 5] "shuffle the rows of a tensor" ...

python launch/search.py --store FOLDER_OR_RECIPE [--where FIELD=VALUE ...] [--top 5] "shuffle the rows of a tensor" ...
"""

from lodestar.commands import end
from retrieval.search.cli import search_main

if __name__ == "__main__":
    end(search_main())

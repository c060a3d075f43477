"""deepspeed launch/pretrain.py --config configs/pretrain/24gpu.yaml"""

from lodestar.commands import end
from retromae.cli import main

if __name__ == "__main__":
    end(main())

"""torchrun --nproc-per-node 8 launch/finetune.py --config configs/finetune/48gpu.yaml"""

from contrastive.cli import main
from lodestar.commands import end

if __name__ == "__main__":
    end(main())

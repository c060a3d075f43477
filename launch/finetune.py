"""torchrun --nproc-per-node 8 launch/finetune.py --config configs/finetune/48gpu.yaml"""

from contrastive.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

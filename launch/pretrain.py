"""deepspeed launch/pretrain.py --config configs/pretrain/24gpu.yaml"""

from retromae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""python launch/evaluate.py --config FILE [KEY=VALUE ...] [--plan [WORLD_SIZE]] [--json]"""

from contrastive.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())

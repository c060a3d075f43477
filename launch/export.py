"""python launch/export.py --config FILE [KEY=VALUE ...] [--plan] [--json]"""

from retrieval.export.onnx import main

if __name__ == "__main__":
    raise SystemExit(main())

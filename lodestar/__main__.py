"""`python -m lodestar`, `torchrun -m lodestar` and `deepspeed --module lodestar`: the `lodestar` command."""

from lodestar.commands import end, main

if __name__ == "__main__":
    end(main())

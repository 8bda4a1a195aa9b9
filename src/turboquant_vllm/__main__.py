"""`python -m turboquant_vllm`: the same as the command `turboquant`."""

from turboquant_vllm.cli import main

if __name__ == "__main__":
    main()

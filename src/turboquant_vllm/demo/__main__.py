"""`python -m turboquant_vllm.demo`."""

from turboquant_vllm.demo.run import main

if __name__ == "__main__":
    main()

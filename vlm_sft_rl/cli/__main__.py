"""`python -m vlm_sft_rl.cli`: the same as `vlm-sft-rl`."""

from .app import main

if __name__ == "__main__":
    main()

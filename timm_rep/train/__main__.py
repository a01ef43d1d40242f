"""Train in time steps, under torchrun too: ``torchrun --nproc-per-node 4 -m timm_rep.train ...``."""
from . import main

if __name__ == '__main__':
    main(prog='python -m timm_rep.train')

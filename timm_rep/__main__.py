"""``python -m timm_rep``, the same as ``timm-rep``."""
from .cli.main import main

if __name__ == '__main__':
    main(prog_name='timm-rep')

#!/usr/bin/env python3
"""timm's own train.py in time steps, as ``timm-rep train`` runs it: a file to copy or to give to a launcher."""
from timm_rep.train import main

if __name__ == '__main__':
    main(prog='train.py')

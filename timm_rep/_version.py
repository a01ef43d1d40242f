"""Version, and where the package is to be had."""
__version__ = '0.1.0'
# It is on no package index.
REPOSITORY = 'https://github.com/timm-rep/timm_rep'

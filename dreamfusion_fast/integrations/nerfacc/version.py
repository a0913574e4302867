"""The version of nerfacc whose interface this is."""

__version__ = "0.5.3"

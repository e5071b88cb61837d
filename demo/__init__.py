"""The embedded default: tiny trained AR video models in the Wan 2.1 weight layout, their data, codec and command
line."""

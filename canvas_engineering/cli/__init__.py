"""The command line ``canvas-engineering``: one module per command, listed in :mod:`canvas_engineering.cli.main`.

A command module has ``add_parser(subparsers)``, which adds its parser with ``set_defaults(command=main)``, and
``main(args)``, which returns the exit status.
"""

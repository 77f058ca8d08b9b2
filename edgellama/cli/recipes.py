"""Verb `recipes` of the command line."""

from __future__ import annotations

import argparse
import sys

from edgellama.cli.arguments import json_option, write_json


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", metavar="NAME", nargs="?", help="print one recipe as JSON")
    json_option(p)


def main(args: argparse.Namespace) -> int:
    """Lists the recipes, or prints one as JSON. Returns 0."""
    from edgellama.recipe import RECIPES, find_recipe

    if args.name:
        recipe = find_recipe(args.name)
        write_json(args.json or "-", recipe.to_dict())
        return 0
    for recipe in RECIPES.values():
        print(f"{recipe.name:<12} {recipe.summary}", file=sys.stderr if args.json == "-" else sys.stdout)
    write_json(args.json, [recipe.to_dict() for recipe in RECIPES.values()])
    return 0

"""Push a trained folder to the Hub in one commit, or prove that one there loads.

python scripts/push_to_hub.py runs/showcase me/my-vit --private
python scripts/push_to_hub.py runs/showcase me/my-vit --space me/my-page
python scripts/push_to_hub.py --verify me/my-vit

A folder that would not load from the Hub is refused before anything is sent,
with what is missing. Log in once with `hf auth login`; tokens are not taken on
the command line, where others could read them.

--space makes a Space of it as well: the page of demo.py for this model, where
anybody can drop an image. --examples shows images of yours, there and in the
model's card.

Exit status: 0; 1 if it was refused or failed; 2 if an option is wrong.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cli

if TYPE_CHECKING:
    from modeling_vit_scratch.hub import Pushed

PROGRAM = "push_to_hub.py"
PAGE = Path(__file__).parent / "demo.py"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, f"{PROGRAM} FOLDER REPO_ID [--option value ...]")
    what = parser.add_argument_group("what and where")
    what.add_argument("folder", nargs="?", metavar="FOLDER", help="to push; with --verify, the one to compare with")
    what.add_argument("repo_id", nargs="?", metavar="REPO_ID", help="owner/name, or name alone if it is your own")
    push = parser.add_argument_group("pushing")
    push.add_argument("--private", action="store_true", help="nobody else may see a new repository")
    push.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--commit_message", default="Upload model", metavar="TEXT", help="first line of the commit")
    push.add_argument("--revision", metavar="NAME", help="branch; with --verify, a branch, tag or commit")
    page = parser.add_argument_group("page")
    page.add_argument(
        "--space", metavar="NAME", help="also push a Space with a page for the model: owner/name, or name"
    )
    page.add_argument("--examples", nargs="+", metavar="IMAGE", help="files or folders, shown to all who see it")
    verify = parser.add_argument_group("verifying")
    verify.add_argument("--verify", metavar="REPO_ID", help="pull, load without this package, compare every bit")
    verify.add_argument("--trust_remote_code", action="store_true", help="run code that differs from this package's")
    args = parser.parse_args(argv)
    if args.verify and (args.repo_id or args.private or args.create_pr or args.space or args.examples):
        parser.error("--verify takes at most a FOLDER, --revision and --trust_remote_code beside it.")
    if not args.verify and not (args.folder and args.repo_id):
        parser.error("FOLDER and REPO_ID are needed, or --verify REPO_ID.")
    if not args.verify and args.trust_remote_code:
        parser.error("--trust_remote_code belongs to --verify.")
    if args.space and (args.create_pr or args.revision):
        parser.error("--space reads the model's main branch: not with --create_pr or --revision.")
    return args


def run(args: argparse.Namespace) -> int:
    from modeling_vit_scratch import hub
    from modeling_vit_scratch.evaluation.inference import find_images

    examples = []
    for name, wrong in find_images(args.examples or []):
        if wrong:
            cli.say(PROGRAM, f"--examples {name}: {wrong}.")
            return 2
        examples.append(Path(name))
    try:
        if args.verify:
            result = hub.verify_repo(
                args.verify, args.revision, folder=args.folder, trust_remote_code=args.trust_remote_code
            )
            print(f"{result.repo_id}@{result.commit} loads without this package")
            for name, shape in result.shapes.items():
                print(f"{name} {shape}: every bit equals {result.reference}")
            return 0
        pushed = hub.push_folder(
            args.folder,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
            examples=examples,
        )
        for name, reason in pushed.left_out.items():
            print(f"left out: {name} ({reason})", file=sys.stderr)
        say_what_was_pushed(pushed)
        if args.space:
            space = hub.push_space(PAGE, args.space, pushed.repo_id, examples, args.private)
            say_what_was_pushed(space)
            if space.needs_token:
                print(
                    "The page needs a token that may read the model: add it as the Space's secret HF_TOKEN.",
                    file=sys.stderr,
                )
    except (hub.FolderError, hub.HubError) as error:
        cli.say(PROGRAM, str(error))
        return 1
    return 0


def say_what_was_pushed(pushed: "Pushed"):
    """One line on the standard error, and its address on the standard output."""
    if not pushed.changed:
        print(f"{pushed.repo_id} is up to date: no commit was made", file=sys.stderr)
    else:
        print(f"{pushed.repo_id}: {len(pushed.files)} files in one commit", file=sys.stderr)
    print(pushed.pr_url or pushed.url)


def main(argv: list[str] | None = None) -> int:
    return cli.run(PROGRAM, parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Push a trained folder to the Hub in one commit, or prove that one there loads.

python scripts/push_to_hub.py runs/showcase me/my-vit --private
python scripts/push_to_hub.py --verify me/my-vit

A folder that would not load from the Hub is refused before anything is sent,
with what is missing. Log in once with `hf auth login`; tokens are not taken on
the command line, where others could read them.

Exit status: 0; 1 if it was refused or failed; 2 for wrong options.
"""

import argparse
import sys

from modeling_vit_scratch import cli, hub


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "push_to_hub.py FOLDER REPO_ID [--option value ...]")
    what = parser.add_argument_group("what and where")
    what.add_argument("folder", nargs="?", metavar="FOLDER", help="to push; with --verify, the one to compare with")
    what.add_argument("repo_id", nargs="?", metavar="REPO_ID", help="owner/name, or name alone if it is your own")
    push = parser.add_argument_group("pushing")
    push.add_argument("--private", action="store_true", help="nobody else may see a new repository")
    push.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--commit_message", default="Upload model", metavar="TEXT", help="first line of the commit")
    push.add_argument("--revision", metavar="NAME", help="branch; with --verify, a branch, tag or commit")
    verify = parser.add_argument_group("verifying")
    verify.add_argument("--verify", metavar="REPO_ID", help="pull, load without this package, compare every bit")
    verify.add_argument("--trust_remote_code", action="store_true", help="run code that differs from this package's")
    args = parser.parse_args(argv)
    if args.verify and (args.repo_id or args.private or args.create_pr):
        parser.error("--verify takes at most a FOLDER, --revision and --trust_remote_code beside it.")
    if not args.verify and not (args.folder and args.repo_id):
        parser.error("FOLDER and REPO_ID are needed, or --verify REPO_ID.")
    if not args.verify and args.trust_remote_code:
        parser.error("--trust_remote_code belongs to --verify.")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
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
        )
    except (hub.FolderError, hub.HubError) as error:
        cli.say("push_to_hub.py", str(error))
        return 1
    for name, reason in pushed.left_out.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    if not pushed.changed:
        print(f"{pushed.repo_id} is up to date: no commit was made", file=sys.stderr)
    else:
        print(f"{pushed.repo_id}: {len(pushed.files)} files in one commit", file=sys.stderr)
    print(pushed.pr_url or pushed.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A push is one commit or none: the real huggingface_hub client and hub_server.py's small Hub."""

import shutil

import huggingface_hub
import pytest
from hub_folders import MODEL_FILES, digest, give_up_after, make_model
from hub_server import OTHER_TOKEN, TOKEN, WRONG_TOKEN
from huggingface_hub import HfApi
from runs import load_script

from modeling_vit_scratch.hub import HubError, HubPushCallback, prepare_repo, push_folder, verify_repo
from modeling_vit_scratch.hub import push as push_module
from modeling_vit_scratch.hub.model_card import REPO_PLACEHOLDER


def test_push_is_one_commit_with_everything(folder, hub):
    before = digest(folder)
    pushed = push_folder(folder, "x", commit_message="First")
    assert hub.commits("me/x") == ["First"] and pushed.repo_id == "me/x"
    assert pushed.changed and pushed.commit == hub.head("me/x") and pushed.url.endswith(f"me/x/commit/{pushed.commit}")
    plots = {f"plots/{name}.png" for name in ("confusion_matrix", "another", "training_curves")}
    files = hub.files("me/x")
    assert set(files) == MODEL_FILES | plots | {"README.md", "metrics.json", "history.csv", ".gitattributes"}
    left_out = {"checkpoint-10/", "training_args.bin", "trainer_state.json", "run.log", ".secret", "samples.png"}
    assert set(pushed.left_out) == left_out
    for name in set(files) - {"README.md", ".gitattributes"}:
        assert files[name] == (folder / name).read_bytes(), name
    assert 'repo = "me/x"' in files["README.md"].decode() and REPO_PLACEHOLDER not in files["README.md"].decode()
    assert digest(folder) == before


def test_push_again_makes_no_commit_and_changes_make_one(folder, hub):
    first = push_folder(folder, "me/x")
    again = push_folder(folder, "me/x")
    assert not again.changed and again.commit == first.commit and len(hub.commits("me/x")) == 1

    make_model(seed=1).save_pretrained(folder)
    (folder / "plots" / "another.png").unlink()
    push_folder(folder, "me/x", commit_message="Second")
    assert hub.commits("me/x") == ["Upload model", "Second"]
    assert hub.files("me/x")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "plots/another.png" not in hub.files("me/x")


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(folder, hub):
    (folder / "adapter").mkdir()
    for name in ("README.md", "adapter_config.json"):
        (folder / "adapter" / name).write_text("{}")
    push_folder(folder, "me/x")
    assert {"adapter/README.md", "adapter/adapter_config.json"} <= hub.files("me/x").keys()
    shutil.rmtree(folder / "adapter")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="me/x")
    (folder / "model.safetensors").unlink()
    make_model(seed=1).save_pretrained(folder, max_shard_size="20KB")
    push_folder(folder, "me/x")
    files = hub.files("me/x")
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert not any(name.startswith("adapter/") for name in files)
    assert files["notes.txt"] == b"mine"  # what others put there stays
    assert not push_folder(folder, "me/x").changed


def test_branch_and_pull_request(folder, hub):
    main = push_folder(folder, "me/x").commit
    make_model(seed=1).save_pretrained(folder)
    on_branch = push_folder(folder, "me/x", revision="experiment/2")
    assert hub.head("me/x") == main and hub.head("me/x", "experiment/2") == on_branch.commit != main
    assert not push_folder(folder, "me/x", revision="experiment/2").changed

    proposed = push_folder(folder, "me/x", create_pr=True, commit_message="Better")
    assert proposed.pr_url.endswith("me/x/discussions/1") and hub.head("me/x") == main
    assert hub.commits("me/x", "refs/pr/1") == ["Upload model", "Better"]
    assert hub.files("me/x", "refs/pr/1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    # Somebody who may not write there may still propose.
    stranger = push_folder(folder, "me/x", create_pr=True, token=OTHER_TOKEN)
    assert stranger.pr_url.endswith("me/x/discussions/2") and hub.head("me/x") == main


def test_private_repository_and_wrong_tokens(folder, hub):
    push_folder(folder, "me/hidden", private=True)
    assert hub.repos["model", "me/hidden"].private
    head = hub.head("me/hidden")
    make_model(seed=1).save_pretrained(folder)
    for token in (WRONG_TOKEN, OTHER_TOKEN):
        with pytest.raises(HubError, match=r"me/hidden was not pushed: .*hf auth login") as refusal:
            push_folder(folder, "me/hidden", token=token)
        assert token not in str(refusal.value)
        with pytest.raises(HubError, match="me/hidden was not prepared"):
            prepare_repo("me/hidden", token=token)
        with pytest.raises(HubError, match="me/hidden was not verified"):
            verify_repo("me/hidden", token=token)
    assert hub.head("me/hidden") == head
    assert prepare_repo("hidden", private=True) == "me/hidden"

    push_folder(folder, "me/open")
    head, sent = hub.head("me/open"), len(hub.lfs)
    make_model(seed=2).save_pretrained(folder)
    with pytest.raises(HubError, match="me/open exists and is public"):
        push_folder(folder, "me/open", private=True)
    assert hub.head("me/open") == head and len(hub.lfs) == sent
    with pytest.raises(HubError, match="Repo id must"):
        push_folder(folder, "me//x")


def test_a_commit_of_somebody_else_meanwhile_is_not_mixed_in(folder, hub, monkeypatch):
    """What did not change is not sent; if it changes on the server before the commit, it must be sent after all."""
    push_folder(folder, "me/x")
    config = (folder / "config.json").read_bytes()
    make_model(seed=1).save_pretrained(folder)
    preupload, meddle = HfApi.preupload_lfs_files, [True]

    def and_then_somebody_commits(self, *args, **kwargs):
        preupload(self, *args, **kwargs)
        if meddle and meddle.pop():
            HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="me/x")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", and_then_somebody_commits)
    push_folder(folder, "me/x", commit_message="Mine")
    assert hub.commits("me/x")[-1] == "Mine" and len(hub.commits("me/x")) == 3
    assert hub.files("me/x")["config.json"] == config


# Servers that fail


def assert_untouched_then_retry(folder, hub, before, head):
    """After a failed push: nothing of it shows on the server or here, and the same call completes it."""
    assert digest(folder) == before
    assert hub.head("me/x") == head
    hub.heal()
    pushed = push_folder(folder, "me/x")
    assert pushed.changed and hub.files("me/x")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert MODEL_FILES <= set(hub.files("me/x"))


@pytest.mark.parametrize("where", [("PUT", "/lfs/"), ("POST", "/preupload/"), ("POST", "/commit/")], ids=str)
def test_a_server_that_dies_in_mid_upload(folder, hub, no_waiting, where):
    push_folder(folder, "me/x")
    make_model(seed=1).save_pretrained(folder)
    before, head = digest(folder), hub.head("me/x")
    hub.fault(*where, "die")
    with pytest.raises(HubError, match=r"me/x was not pushed: .*does not answer as it should"):
        push_folder(folder, "me/x")
    hub.start()
    assert_untouched_then_retry(folder, hub, before, head)


@pytest.mark.parametrize("action", ["reset", 503])
def test_short_failures_are_ridden_out(folder, hub, no_waiting, action):
    hub.fault("PUT", "/lfs/", action, times=3)
    hub.fault("POST", "/preupload/", action, times=3)
    assert push_folder(folder, "me/x").changed and len(hub.commits("me/x")) == 1


def test_a_lost_answer_is_no_second_commit(folder, hub, no_waiting):
    hub.fault("POST", "/commit/", "lose")
    with pytest.raises(HubError):
        push_folder(folder, "me/x")
    assert not push_folder(folder, "me/x").changed and len(hub.commits("me/x")) == 1


@pytest.mark.parametrize("where", [("POST", "/api/repos/create"), ("POST", "/commit/")], ids=str)
def test_a_server_that_accepts_and_never_answers(folder, hub, no_waiting, where, monkeypatch):
    push_folder(folder, "me/x")
    make_model(seed=1).save_pretrained(folder)
    before, head = digest(folder), hub.head("me/x")
    give_up_after(monkeypatch, 1.0)
    silent = hub.fault(*where, "hang")
    with pytest.raises(HubError, match="Timeout"):
        push_folder(folder, "me/x")
    assert silent.hits == 1  # given up at the first, while the server still holds it
    give_up_after(monkeypatch, 60)
    assert_untouched_then_retry(folder, hub, before, head)


def test_clients_made_anew_give_up_too_and_keep_what_the_user_set(monkeypatch):
    """huggingface_hub makes a new client when a connection fails; proxies and certificates are set by a factory."""
    http = push_module._http
    push_module.give_up_on_silence()
    for _ in range(2):
        assert huggingface_hub.get_session().timeout.read == push_module.TIMEOUT_SECONDS
        assert http.hf_request_event_hook in huggingface_hub.get_session().event_hooks["request"]
        huggingface_hub.close_session()

    def own(seconds):
        def make():
            client = http.default_client_factory()
            client.headers["x-own"], client.timeout = "yes", seconds
            return client

        return make

    for seconds, expected in ((None, push_module.TIMEOUT_SECONDS), (7.0, 7.0)):
        monkeypatch.setattr(http, "_GLOBAL_CLIENT_FACTORY", own(seconds))
        huggingface_hub.close_session()
        session = huggingface_hub.get_session()
        push_module.give_up_on_silence()
        assert huggingface_hub.get_session() is session and not session.is_closed  # another thread may be using it
        assert session.headers["x-own"] == "yes" and session.timeout.read == expected
    monkeypatch.undo()
    huggingface_hub.close_session()


def test_tokens_appear_nowhere(folder, hub, no_waiting, caplog, capfd, monkeypatch):
    """Not in errors, logs or output, not even if the server sends it back."""
    caplog.set_level("INFO")
    caplog.set_level("DEBUG", logger="huggingface_hub")
    tokens, texts = (TOKEN, WRONG_TOKEN, OTHER_TOKEN, "a-token-unlike-others"), []
    for token in tokens:
        monkeypatch.setenv("HF_TOKEN", token)
        for where in ("/api/repos/create", "/commit/"):
            make_model(seed=len(texts)).save_pretrained(folder)
            hub.fault("POST", where, 400)
            with pytest.raises(HubError) as failure:
                push_folder(folder, "me/x")
            texts.append(str(failure.value))
            assert failure.value.__cause__ is None and failure.value.__suppress_context__
        hub.heal()
    assert sum("fault 400 for Bearer ***" in text for text in texts) == 5  # only one of the users gets to the commit
    callback = HubPushCallback("me/x", token=WRONG_TOKEN, retry_seconds=())
    assert callback.push_final(folder) is None and callback.errors
    out, err = capfd.readouterr()
    everything = "\n".join([*texts, *callback.errors, caplog.text, out, err, *map(str, hub.files("me/x").values())])
    for token in tokens:
        assert token not in everything


# The script


@pytest.fixture(scope="module")
def script():
    return load_script("push_to_hub")


def test_script(folder, hub, script, capsys):
    assert script.main([str(folder), "me/x", "--private", "--revision", "b", "--commit_message", "By script"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{hub.url}/me/x/commit/{hub.head('me/x', 'b')}\n"
    assert "left out: checkpoint-10/ (a checkpoint)" in err
    assert hub.commits("me/x", "b") == ["By script"] and hub.repos["model", "me/x"].private
    assert script.main([str(folder), "me/x", "--revision", "b"]) == 0
    assert "up to date" in capsys.readouterr().err
    assert script.main([str(folder), "me/x", "--create_pr"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/me/x/discussions/1\n"

    (folder / "README.md").unlink()
    assert script.main([str(folder), "me/x"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "README.md is missing" in err
    hub.stop()
    assert script.main(["--verify", "me/x"]) == 1
    assert "me/x was not verified" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [[], ["folder"], ["a", "b", "c"], ["a", "b", "--trust_remote_code"], ["--verify"], ["a", "b", "--verify", "c"],
     ["--verify", "c", "--private"], ["a", "b", "--priv"]],
    ids=" ".join,
)  # fmt: skip
def test_script_refuses_wrong_arguments(script, argv, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(argv)
    assert end.value.code == 2 and capsys.readouterr().out == ""

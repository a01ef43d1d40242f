"""Repositories: what is there already, and what can go wrong on the way, over real HTTP with the real client."""
import base64
import contextlib
import io
import json
import logging
import re
import warnings
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner
from hub_publishing import (
    ARCHITECTURE,
    CLASSES,
    REPO,
    SECRET,
    call,
    card_of,
    publish_json,
    put_card,
)
from hub_server import READER, WRITER
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http

import timm_rep
from timm_rep.cli.main import main
from timm_rep.hub import publish as publishing
from timm_rep.hub.card import is_generated
from timm_rep.io.hub_errors import hub_message
from timm_rep.report.cost import Costs


@pytest.fixture(autouse=True)
def _costs(monkeypatch):
    """They take a third of the time, and are none of these tests' business."""
    costs = Costs((2, 1), (2.0, 1.0), (1.0, 2.0), 8, 'an abacus', '2.6', 'float32')
    monkeypatch.setattr(publishing, 'measure_costs', lambda *args, **kwargs: costs)


def assert_not_published(server, error, folder=Path('test_resnet.orepa_pets')):
    """Nothing of it can be seen on the Hub; the folder is there and complete."""
    assert set(server.files(REPO)) == {'.gitattributes'} if REPO in server.repos else True
    assert 'The Hub has confirmed no commit' in error
    assert str(folder.resolve()) in error
    assert 'outputs agree' in str(timm_rep.check_export(folder))


def test_publishing_again_replaces_what_was_generated_and_nothing_else(server, full_run, model, tmp_path):
    timm_rep.publish(full_run, REPO)
    huggingface_hub.HfApi().upload_file(path_or_fileobj=b'mine', path_in_repo='notes.txt', repo_id=REPO)
    timm_rep.io.weights.save_weights(model, tmp_path / 'weights.safetensors')
    timm_rep.publish(
        tmp_path / 'weights.safetensors', REPO, architecture=ARCHITECTURE, num_classes=CLASSES, dataset='Pets')
    files = server.files(REPO)
    assert '**Data set:** Pets' in card_of(server)
    assert files['notes.txt'] == b'mine'
    assert not set(files) & {'args.yaml', 'summary.csv', 'training.png'}
    assert len(server.messages(REPO)) == 4


@pytest.mark.parametrize('revision', ['main', 'train'])
@pytest.mark.parametrize('change', [
    lambda card: '---\nlicense: mit\n---\n', lambda card: card.replace('license: unknown', 'license: mit')])
def test_a_card_that_somebody_wrote_or_changed_stays(server, run_folder, tmp_path, change, revision):
    options = ['publish', run_folder, '--repo', REPO, '--include-training-form']
    call(*options, '--dry-run', '--out', tmp_path / 'first')
    card = change((tmp_path / 'first' / 'README.md').read_text())
    huggingface_hub.HfApi().create_repo(REPO)
    huggingface_hub.HfApi().create_branch(REPO, branch='train')
    put_card(card, revision)
    error = call(*options, '--out', tmp_path / 'second', code=3)
    there = REPO if revision == 'main' else f'{REPO}@train'
    assert f'the model card of {there} was written or changed by hand' in error
    assert 'failed' not in error
    assert (card_of(server, revision), len(server.messages(REPO, revision))) == (card, 2)
    call(*options, '--replace-card')
    assert is_generated(card_of(server, revision))
    call(*options)


def test_files_of_another_model_stay(server, run_folder):
    api = huggingface_hub.HfApi()
    api.create_repo(REPO)
    for name in ('model.safetensors', 'summary.csv', 'notes.txt'):
        api.upload_file(path_or_fileobj=b'mine', path_in_repo=name, repo_id=REPO)
    before = server.files(REPO)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert f'{REPO} holds model.safetensors, summary.csv, but no model card of timm_rep' in error
    assert server.files(REPO) == before
    call('publish', run_folder, '--repo', REPO, '--replace-card')
    assert server.files(REPO)['notes.txt'] == b'mine'
    assert is_generated(card_of(server))


def test_new_revision_train_has_a_card_of_its_own(server, run_folder):
    """It starts as a copy of the main one, whose card is no reason to refuse."""
    put_card('# Mine\n')
    call('publish', run_folder, '--repo', REPO, '--revision', 'candidate', '--include-training-form')
    assert card_of(server) == '# Mine\n'
    assert card_of(server, 'train') == card_of(server, 'candidate')


def test_private(server, run_folder, monkeypatch):
    huggingface_hub.HfApi().create_repo(REPO)
    assert 'exists and is public' in call('publish', run_folder, '--repo', REPO, '--private', code=3)
    assert set(server.files(REPO)) == {'.gitattributes'}
    del server.repos[REPO]
    publish_json(run_folder, '--repo', REPO, '--private')
    assert server.repos[REPO].private
    monkeypatch.setenv('HF_TOKEN', READER)
    assert 'Error' in call('verify', f'hf-hub:{REPO}', code=3)
    monkeypatch.setenv('HF_TOKEN', WRITER)
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}')
    publish_json(run_folder, '--repo', REPO, '--private')


def test_another_revision_is_named_everywhere(server, run_folder):
    published = publish_json(run_folder, '--repo', REPO, '--revision', 'candidate')
    there = f'{REPO}@candidate'
    card = card_of(server, 'candidate')
    assert re.findall(rf'{REPO}(?!@candidate)', card) == []
    assert card.count(f'hf-hub:{there}') == 5
    assert '\n# test_resnet.orepa_pets\n' in card
    assert published['registry_entry'][f'{ARCHITECTURE}.orepa']['hf_hub_id'] == there
    output = call('publish', run_folder, '--repo', REPO, '--revision', 'candidate', '--include-training-form')
    assert f"Load it with timm.create_model('hf-hub:{there}', pretrained=True)" in output
    assert f"hf-hub:{REPO}@train'" in card_of(server, 'candidate')
    assert 'outputs agree' in call('verify', f'hf-hub:{there}')


def test_pull_request_is_loaded_once_it_is_merged(server, run_folder):
    assert 'in one pull request.' in call('publish', run_folder, '--repo', REPO, '--create-pr', '--dry-run')
    output = call('publish', run_folder, '--repo', REPO, '--create-pr')
    load = f"timm.create_model('hf-hub:{REPO}', pretrained=True)"
    assert f'/discussions/1\nOnce it is merged, load it with {load}\n' in output
    assert 'To let pretrained=True find' not in output
    published = publish_json(run_folder, '--repo', REPO, '--create-pr')
    assert published['pull_request'].endswith('/discussions/2')
    assert published['registry_entry'] is None
    assert set(server.files(REPO)) == {'.gitattributes'}
    assert 'model.safetensors' in server.files(REPO, 'refs/pr/1')


def test_branch_and_tag(server, run_folder):
    publish_json(run_folder, '--repo', REPO, '--revision', 'candidate', '--git-tag', 'v1')
    assert set(server.files(REPO)) == {'.gitattributes'}
    assert server.repos[REPO].tags == dict(v1=server.repos[REPO].branches['candidate'])
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}@v1')
    assert 'has the tag v1 already' in call('publish', run_folder, '--repo', REPO, '--git-tag', 'v1', code=3)


@pytest.mark.parametrize('token', ['', 'hf_wrongwrong'])
def test_nothing_is_done_for_who_is_not_logged_in(server, run_folder, monkeypatch, token):
    monkeypatch.setenv('HF_TOKEN', token)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert 'not logged in' in error
    assert 'Nothing was done; a dry run (--dry-run) writes the folder without' in error
    assert not token or token not in error
    assert REPO not in server.repos
    assert not Path(REPO.partition('/')[2]).exists()


def test_no_right_to_write(server, run_folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', READER)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert 'the token may not do that' in error
    assert READER not in error
    assert_not_published(server, error)
    assert REPO not in server.repos


def test_the_token_that_is_given_is_used(server, run_folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', READER)
    assert timm_rep.publish(run_folder, REPO, token=WRITER).commit is not None


@pytest.mark.parametrize(('secret', 'token'), [
    (SECRET, None), ('plain-environment', None), ('plain-given', 'plain-given')])
def test_message_names_no_token(monkeypatch, secret, token):
    monkeypatch.setenv('HF_TOKEN', 'plain-environment')
    assert hub_message(RuntimeError(f'refused\n{secret}'), token) == 'RuntimeError: refused ***'


def test_json_is_all_of_the_output(server, run_folder, images, capsys):
    main(['publish', str(run_folder), '--repo', REPO, '--data', str(images), '--json'], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)['images']['images'] == 2 * CLASSES


def test_the_token_is_left_out_of_errors(server, run_folder):
    server.fail('GET', 'whoami', status=400)
    with pytest.raises(timm_rep.PublishError) as error:
        timm_rep.publish(run_folder, f'me/test_resnet.{WRITER}', token=WRITER)
    assert WRITER not in str(error.value).replace(f'test_resnet.{WRITER}', '')
    assert error.value.__cause__ is None


REFLECTED = dict(
    plain=WRITER, quoted=''.join(f'%{ord(letter):02X}' for letter in WRITER),
    base64=base64.b64encode(f'me:{WRITER}'.encode()).decode(), header=f'Bearer {WRITER}',
    urlsafe=base64.urlsafe_b64encode(f'hf:{WRITER}'.encode()).decode(), hex=WRITER.encode().hex())


@pytest.mark.parametrize('status', [400, 403, 500])
@pytest.mark.parametrize('form', REFLECTED)
def test_a_token_that_the_server_sends_back_is_not_shown(server, run_folder, export, form, status, caplog):
    server.fail('GET', '/api/models', times=10 ** 3, status=status, message=f'got "{REFLECTED[form]}"')
    error = call('verify', f'hf-hub:{REPO}', code=3)
    assert f'{REPO} cannot be fetched: ' in error
    assert 'got' in error
    assert_not_told(error + caplog.text, form)


@pytest.mark.parametrize('form', REFLECTED)
def test_a_token_is_not_shown_in_any_place(server, run_folder, form, monkeypatch, capfd):
    """Whatever the client raises, logs or gives."""
    handler = logging.getLogger('huggingface_hub').handlers[0]
    monkeypatch.setattr(handler, 'stream', io.StringIO())
    commit = HfApi.create_commit

    def create_commit(self, *args, **kwargs):
        logging.getLogger('huggingface_hub.utils').warning('the server says: %s', REFLECTED[form])
        warnings.warn(f'a warning {REFLECTED[form]}', stacklevel=1)
        info = commit(self, *args, **kwargs)
        info.commit_url = f'{info.commit_url}?{REFLECTED[form]}'
        return info

    monkeypatch.setattr(HfApi, 'create_commit', create_commit)
    output = call('publish', run_folder, '--repo', REPO)
    logged = handler.stream.getvalue()
    assert 'the server says: ' in logged
    assert_not_told(output + logged + ''.join(capfd.readouterr()), form)

    def defect(*args, **kwargs):
        raise KeyError(REFLECTED[form])

    monkeypatch.setattr(HfApi, 'model_info', defect)
    monkeypatch.setattr('timm_rep.hub.check.hub_errors', lambda repo: contextlib.nullcontext())
    result = CliRunner().invoke(main, ['verify', f'hf-hub:{REPO}', '--json'])
    assert result.exit_code == 4
    assert 'Traceback' in result.output
    assert_not_told(result.output, form)


def assert_not_told(text, form):
    secret = REFLECTED[form]
    parts = {WRITER, secret, secret[4:-4], WRITER[3:]}
    assert not [part for part in parts if part.lower() in text.lower()]


def test_commit_of_somebody_else_in_between_is_not_overwritten(server, run_folder, monkeypatch):
    send = HfApi.create_commit

    def create_commit(self, *args, **kwargs):
        repo = server.repos[REPO]
        repo.add('main', 'of somebody else', repo.commit('main').files)
        return send(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, 'create_commit', create_commit)
    assert 'changed by somebody else' in call('publish', run_folder, '--repo', REPO, code=3)
    assert server.messages(REPO) == ['of somebody else', 'initial commit']


@pytest.mark.parametrize(('method', 'path'), [('PUT', '/upload/'), ('POST', '/commit/')])
def test_a_server_error_that_stays_publishes_nothing(server, run_folder, method, path):
    server.fail(method, path, status=500, times=50)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert '500' in error
    assert_not_published(server, error)
    server.faults.clear()
    publish_json(run_folder, '--repo', REPO)
    assert len(server.messages(REPO)) == 2


def test_failure_behind_the_training_form_says_what_is_there(server, run_folder):
    server.fail('POST', '/commit/main', status=500)
    error = call('publish', run_folder, '--repo', REPO, '--include-training-form', code=3)
    assert f'On the Hub: {server.url}/{REPO}/commit/{server.repos[REPO].branches["train"]} (look at' in error
    assert set(server.files(REPO)) == {'.gitattributes'}


@pytest.mark.parametrize(('name', 'damage'), [('README.md', None), ('model.safetensors', lambda content: content[:-1])])
def test_a_file_that_arrives_damaged_is_noticed(server, run_folder, monkeypatch, name, damage):
    send = HfApi.create_commit

    def create_commit(self, *args, **kwargs):
        commit = send(self, *args, **kwargs)
        files = server.repos[REPO].commit('main').files
        content, large = files.pop(name)
        if damage:
            files[name] = damage(content), large
        return commit

    monkeypatch.setattr(HfApi, 'create_commit', create_commit)
    error = call('publish', run_folder, '--repo', REPO, '--git-tag', 'v1', code=3)
    commit = f'{server.url}/{REPO}/commit/{server.repos[REPO].branches["main"]}'
    assert f'not all in {commit} is what was sent ({name}); publish again. On the Hub: {commit} (look at' in error
    assert server.repos[REPO].tags == {}


@pytest.mark.parametrize(('method', 'path', 'status'), [('POST', '/paths-info/', 500), ('POST', '/tag/', 409)])
def test_failure_behind_the_commit_says_that_it_is_there(server, run_folder, method, path, status):
    server.fail(method, path, status=status, times=50)
    error = call('publish', run_folder, '--repo', REPO, '--git-tag', 'v1', code=3)
    commit = f'{server.url}/{REPO}/commit/{server.repos[REPO].branches["main"]}'
    assert f'On the Hub: {commit} (look at {server.url}/{REPO}); the folder' in error
    assert ('changed by somebody else in between' in error) == (status == 409)
    assert server.repos[REPO].tags == {}
    assert 'model.safetensors' in server.files(REPO)


def test_answer_to_a_commit_is_lost(server, run_folder):
    """Whether it is there nobody here knows, and none is said not to be."""
    server.fail('POST', '/commit', cut_after=0)
    error = call('publish', run_folder, '--repo', REPO, code=3)
    assert f'The Hub has confirmed no commit (look at {server.url}/{REPO}); the folder' in error
    assert 'model.safetensors' in server.files(REPO)


def test_server_that_is_gone(server, run_folder):
    for real in server.servers:
        real.shutdown()
        real.server_close()
    assert 'Nothing was done' in call('publish', run_folder, '--repo', REPO, code=3)
    assert not Path(REPO.partition('/')[2]).exists()
    assert 'cannot be fetched' in call('verify', f'hf-hub:{REPO}', code=3)


def test_offline_from_the_cache(server, run_folder, monkeypatch):
    publish_json(run_folder, '--repo', REPO)
    call('verify', f'hf-hub:{REPO}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    getattr(_http, 'reset_sessions', lambda: None)()  # an older client looks only when it makes one
    before = len(server.requests)
    assert 'outputs agree' in call('verify', f'hf-hub:{REPO}')
    assert 'is not in the cache' in call('verify', 'hf-hub:me/other', code=3)
    assert len(server.requests) == before
    monkeypatch.undo()
    getattr(_http, 'reset_sessions', lambda: None)()

"""What is published of a run: all that says what was trained, nothing else, and only if it is of that run."""
import logging
import math

import pytest
import yaml

from timm_rep.io.runs import complete_rows, read_run, read_summary, write_run

ARGS = dict(model='orepa_resnet18', epochs=3, lr=0.1, seed=42, val_split='test', input_size=[3, 32, 32], mean=[0.5] * 3)
SUMMARY = 'epoch,train_top1,eval_top1,eval_top5,eval_loss\n0,10.0,20.0,90.0,1.8\n1,15.0,41.5,97.25,1.6\n'


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    return tmp_path / 'model_best.pth.tar'


def shared(checkpoint, **args):
    run = read_run(checkpoint, args)
    return run.args, set(run.left_out)


def test_arguments_about_the_machine_and_unknown_ones_are_left_out(checkpoint, tmp_path):
    local = dict.fromkeys((
        'data', 'data_dir', 'output', 'experiment', 'resume', 'initial_checkpoint', 'pretrained_path', 'class_map',
        'log_wandb', 'wandb_project', 'wandb_resume_id', 'wandb_tags', 'wandb_key', 'aws_access_key', 'auth',
        'api_key_file', 'password', 'note'), 'plain')
    kept = dict(
        ARGS, no_prefetcher=True, aug_splits=0, input_key=None, kd_token_distill_type='soft', drop=0.0, opt_kwargs={},
        time_steps=2)
    derived = dict(world_size=8, rank=3, local_rank=3, distributed=True, prefetcher=True)
    assert shared(checkpoint, **kept, **local, **derived) == (kept, set(local))
    assert shared(checkpoint, **kept, wandb_tags=[], resume='', data_dir=None) == (kept, set())
    assert shared(checkpoint, log_wandb=False, future=[1, 0.5]) == (dict(log_wandb=False, future=[1, 0.5]), set())
    numbers = dict(pin_code_token=1234, my_secret=[1, 2], wandb_tags=[1, 'plain'], nested=dict(a=1))
    assert shared(checkpoint, **numbers) == ({}, set(numbers))

    write_run(read_run(checkpoint, dict(kept, **local)), tmp_path)
    assert yaml.safe_load((tmp_path / 'args.yaml').read_text()) == kept
    assert 'plain' not in (tmp_path / 'args.yaml').read_text()


@pytest.mark.parametrize('value', [
    '/home/joe', 'see /home/joe/x', '../../home/joe', '~joe', 'C:\\Users\\joe', 'at c:/Users/joe',
    'https://host/x?Signature=S', 'local-dir:joe/x', 'hf_abcdefgh1234', 'xhf_testwriter', 'key sk-abcdefgh1234',
    [['/home/joe']], [dict(a='/home/joe')], object()])
def test_private_values_are_left_out(checkpoint, value):
    assert shared(checkpoint, lr=0.1, aa=value) == (dict(lr=0.1), {'aa'})


@pytest.mark.parametrize('value', [
    'rand-m9-mstd0.5-inc1', 'hfds/org/name', 'hf-hub:org/name@train', 'mask-resnet50_half_plus', ['a', 'b'], None])
def test_plain_values_stay(checkpoint, value):
    assert shared(checkpoint, aa=value) == (dict(aa=value), set())


def test_only_the_private_part_of_an_argument_is_left_out(checkpoint):
    overlay = dict(input_size=[3, 32, 32], file='/home/joe/x')
    args, left_out = shared(
        checkpoint,
        model_kwargs=dict(rep_layer='acb', pretrained_cfg_overlay=overlay),
        opt_kwargs={'nesterov': True, '/home/joe': 1, **dict.fromkeys(
            ('my_token', 'client_secret', 'passwd', 'credentials', 'auth', 'apikey_file'), 'x')},
    )
    assert args == dict(
        model_kwargs=dict(rep_layer='acb', pretrained_cfg_overlay=dict(input_size=[3, 32, 32])),
        opt_kwargs=dict(nesterov=True))
    assert left_out == {
        'model_kwargs.pretrained_cfg_overlay.file', 'opt_kwargs....', 'opt_kwargs.my_token', 'opt_kwargs.client_secret',
        'opt_kwargs.passwd', 'opt_kwargs.credentials', 'opt_kwargs.auth', 'opt_kwargs.apikey_file'}


@pytest.mark.parametrize(('path', 'name'), [
    ('/home/joe/start.pth', 'start.pth'), ('C:\\Users\\joe\\secret project\\start.pth', 'start.pth'),
    ('https://bucket.example.com/joe/w.pth?X-Amz-Signature=S', 'w.pth'), ('/home/joe/hf_abcdefgh1234.pth', 'FILE')])
def test_start_files_are_named_without_where_they_were(checkpoint, path, name):
    run = read_run(checkpoint, dict(ARGS, initial_checkpoint=path, pretrained_path='', resume='last.pth.tar'))
    assert run.start_files == {'--initial-checkpoint': name}  # a resumed run is the same run


def test_a_file_that_was_not_asked_for_is_no_start(checkpoint):
    """By timm's rule; see `--pretrained-path`."""
    args = dict(ARGS, pretrained_path='/home/joe/start.pth')
    assert read_run(checkpoint, args).start_files == {}
    assert read_run(checkpoint, dict(args, pretrained=True)).start_files == {'--pretrained-path': 'start.pth'}


@pytest.mark.parametrize(('given', 'name'), [
    ('resnet34', 'resnet34'), ('local-dir:/home/joe/big', 'local-dir:big'), ('local-dir:big/', 'local-dir:big'),
    ('local-dir:C:\\Users\\joe\\big', 'local-dir:big'), ('/home/joe/big', 'big'), (None, None), ('', None)])
def test_the_teacher_is_named_without_where_it_was(checkpoint, given, name):
    run = read_run(checkpoint, dict(ARGS, kd_model_name=given))
    assert run.teacher == name
    assert ('kd_model_name' in run.left_out) == bool(given and given != 'resnet34')


def test_processes(checkpoint):
    (checkpoint.parent / 'args.yaml').write_text(yaml.safe_dump(ARGS))  # which train.py writes without them
    assert read_run(checkpoint, dict(ARGS, world_size=8)).processes == 8
    assert read_run(checkpoint, {}).processes == 1


@pytest.mark.parametrize(('key', 'value'), [
    ('seed', 7), ('val_split', 'train'), ('mean', [0.1] * 3), ('model_kwargs', dict(rep_layer='acb'))])
def test_args_of_another_run_are_refused(checkpoint, key, value):
    args = dict(ARGS, model_kwargs={})
    (checkpoint.parent / 'args.yaml').write_text(yaml.safe_dump(dict(args, **{key: value})))
    with pytest.raises(ValueError, match=rf'args\.yaml is of another run than model_best\.pth\.tar: {key} is '):
        read_run(checkpoint, args)


def test_what_train_py_changes_itself_is_no_other_run(checkpoint):
    beside = dict(ARGS, lr=None, num_classes=None, lr_base_scale='', workers=4, device='cuda', mean=[0.5] * 3)
    (checkpoint.parent / 'args.yaml').write_text(yaml.safe_dump(beside))
    changed = dict(
        beside, lr=0.05, num_classes=10, lr_base_scale='linear', workers=8, device='cuda:0', mean=(0.5,) * 3, rank=0)
    expected = {key: value for key, value in beside.items() if value is not None}  # None says nothing
    assert read_run(checkpoint, changed).args == expected
    told = dict(ARGS, lr=0.0, grad_accum_steps=0, sync_bn=True, dist_bn='reduce', lr_cycle_limit=1, lr_cycle_decay=0.5)
    (checkpoint.parent / 'args.yaml').write_text(yaml.safe_dump(told))
    ran = dict(told, lr=0.05, grad_accum_steps=1, dist_bn='', lr_cycle_decay=1.0)
    assert read_run(checkpoint, ran).args == told
    with pytest.raises(ValueError, match=r'grad_accum_steps is 1 in the one and 2'):
        read_run(checkpoint, dict(ran, grad_accum_steps=2))


@pytest.mark.parametrize(('metric', 'args', 'same'), [
    (41.5, {}, True), (None, {}, True), (99.9, {}, False), (float('nan'), {}, False),
    (1.6, dict(eval_metric='loss'), True), (41.5, dict(eval_metric='loss'), False),
    (3.0, dict(eval_metric='mcc'), True)])
def test_figures_that_the_checkpoint_contradicts_are_refused(checkpoint, metric, args, same):
    args = dict(ARGS, **args)
    if same:
        assert read_run(checkpoint, args, 1, metric=metric).metrics == dict(top1=41.5, top5=97.25)
        return
    with pytest.raises(ValueError, match=r'summary\.csv is of another run than model_best\S+: \w+ of epoch 1 is'):
        read_run(checkpoint, args, 1, metric=metric)


def test_without_validation_the_figure_of_the_training_is_compared(checkpoint):
    (checkpoint.parent / 'summary.csv').write_text('epoch,train_top1\n0,10.0\n1,15.0\n')
    assert read_run(checkpoint, ARGS, 1, metric=15.0).metrics == {}
    with pytest.raises(ValueError, match=r'top1 of epoch 1 is 15 in the one and 41\.5 in the other'):
        read_run(checkpoint, ARGS, 1, metric=41.5)


@pytest.mark.parametrize(('args', 'use_ema', 'measured'), [
    ({}, False, True), ({}, True, False), (dict(model_ema=True), True, True), (dict(model_ema=True), False, False),
    (dict(model_ema=True, model_ema_force_cpu=True), False, True),
    (dict(model_ema=True, model_ema_force_cpu=True), True, False), (dict(tta=1), False, True),
    (dict(tta=2), False, False)])
def test_figures_are_of_the_weights_that_train_py_evaluates_last(checkpoint, args, use_ema, measured, caplog):
    with caplog.at_level(logging.WARNING):
        run = read_run(checkpoint, dict(ARGS, **args), 1, use_ema=use_ema)
    assert run.metrics == (dict(top1=41.5, top5=97.25) if measured else {})


DAMAGE = dict(
    zeros=bytes(140_000), digit='²,1.0,2.0'.encode(), bytes=b'1,\xff\xfe,2.0', quote=b'"1,1.0,2.0', inner=b'1,"1.0,2.0',
    long=b'9' * 5000 + b',1.0,2.0', infinite=b'9' * 400 + b',1.0,2.0', escape=b'1,\x1b[2J,2.0', short=b'1,1.0',
    header=b'epoch\x00,loss,top1', empty=b'')


@pytest.mark.parametrize('line', DAMAGE)
def test_a_damaged_line_is_left_out(tmp_path, caplog, line):
    """No other line goes with it."""
    path = tmp_path / 'summary.csv'
    path.write_bytes(b'epoch,loss,top1\r\n0,1.5,10\r\n' + DAMAGE[line] + b'\r\n2,1.25,20\r\n3,1.')
    with caplog.at_level(logging.WARNING):
        assert read_summary(path) == [dict(epoch=0, loss=1.5, top1=10), dict(epoch=2, loss=1.25, top1=20)]
    assert [record.getMessage() for record in caplog.records] == [f'{path}: damaged lines left out: 1']


def test_columns_that_must_be_whole_numbers(tmp_path):
    path = tmp_path / 'branch_gradients.csv'
    path.write_text('epoch,depth,layer\n0,0,stem\n0,x,stem\n0,1,conv1\n')
    assert [row['layer'] for row in complete_rows(path, ('epoch', 'depth'))] == ['stem', 'conv1']
    path.write_text('epoch,depthy,layer\n0,0,stem\n')
    assert list(complete_rows(path, ('epoch', 'depth'))) == []


def test_columns_that_came_with_a_resume_are_written(checkpoint, tmp_path):
    (tmp_path / 'summary.csv').write_text('epoch,eval_top1\n0,10\nepoch,eval_top1,eval_loss\n1,20,1.5\n')
    run = read_run(checkpoint, ARGS)
    write_run(run, tmp_path)
    first, second = read_summary(tmp_path / 'summary.csv')
    assert math.isnan(first.pop('eval_loss'))
    assert (first, second) == (dict(epoch=0, eval_top1=10), dict(epoch=1, eval_top1=20, eval_loss=1.5))

"""An AlgoPerf submission for any PyTorch workload: NAdamW on gradients that K-FAC preconditions."""

import json
from pathlib import Path
from types import SimpleNamespace

import asdl
import torch
from algoperf import spec
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import asdl_ws_plugin

HERE = Path(__file__).parent
SELF_TUNED = SimpleNamespace(**json.loads((HERE / "self_tuning.json").read_text()))


# fmt: off
def get_batch_size(workload_name):
    return json.loads((HERE / "batch_sizes.json").read_text()).get(workload_name, 128)


def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
    settings = hyperparameters or SELF_TUNED  # none in the self-tuning ruleset
    model = asdl_ws_plugin.convert(model_params)
    asdl_ws_plugin.attach_segments(model, "auto")
    asdl_ws_plugin.attach_padding(model, "auto")
    left = [nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d]  # to NAdamW, as grouped convolutions
    left += [module for module in model.modules() if getattr(module, "groups", 1) > 1]
    config = asdl_ws_plugin.recommended(
        damping=settings.damping, ema_decay=settings.ema_decay, ignore_modules=left,
        curvature_upd_interval=settings.curvature_interval,
        preconditioner_upd_interval=settings.inverse_interval)
    kfac = asdl.KfacGradientMaker(
        model, config, fisher_type="fisher_emp", shared_dim=settings.shared_dim)
    optimizer = torch.optim.NAdam(
        model.parameters(), lr=settings.learning_rate, decoupled_weight_decay=True,
        betas=(1 - settings.one_minus_beta1, settings.beta2), weight_decay=settings.weight_decay)
    warmup = max(1, int(settings.warmup_factor * workload.step_hint))
    decay = CosineAnnealingLR(optimizer, max(1, workload.step_hint - warmup))
    parts = [LinearLR(optimizer, 1 / warmup, 1, warmup), decay]
    return {"kfac": kfac, "optimizer": optimizer, "lr": SequentialLR(optimizer, parts, [warmup])}


def update_params(workload, current_param_container, current_params_types, model_state,
                  hyperparameters, batch, loss_type, optimizer_state, eval_results, global_step,
                  rng, train_state=None):
    settings, kfac = hyperparameters or SELF_TUNED, optimizer_state["kfac"]
    optimizer_state["optimizer"].zero_grad()
    output = kfac.setup_model_call(
        workload.model_fn, augmented_and_preprocessed_input_batch=batch, model_state=model_state,
        params=current_param_container, mode=spec.ForwardPassMode.TRAIN, rng=rng,
        update_batch_norm=True, dropout_rate=settings.dropout_rate)
    kfac.setup_loss_call(
        workload.loss_fn, label_batch=batch["targets"], logits_batch=output[0],
        mask_batch=batch.get("weights"), label_smoothing=settings.label_smoothing)
    (_, model_state), _ = kfac.forward_and_backward()
    optimizer_state["optimizer"].step()
    optimizer_state["lr"].step()
    return optimizer_state, current_param_container, model_state


def prepare_for_eval(workload, current_param_container, current_params_types, model_state,
                     hyperparameters, loss_type, optimizer_state, eval_results, global_step,
                     rng):
    return optimizer_state, current_param_container, model_state


def data_selection(workload, input_queue, optimizer_state, current_param_container, model_state,
                   hyperparameters, global_step, rng):
    return next(input_queue)

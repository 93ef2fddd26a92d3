"""What one process of test_sharded.py does: the same losses with a teacher in one piece and in parts."""

import os
import time
import weakref


def work(rank: int, size: int, port: int, folder: str) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, size, "127.0.0.1", port))))
    import torch
    from small_pair import pair, sequence, stage

    from convert.loading import skeleton
    from deltanet_errors import UserError
    from distill.batch import make_batch
    from distill.sharded import shard
    from distill.stages import Align, Whole
    from distill.world import start_world

    torch.set_num_threads(1)
    world, results = start_world(), {}
    batch = make_batch([sequence(rank), sequence(rank + 2)])
    for tied in (True, False):
        for offload in (False, True):
            teacher, student = pair(tie_word_embeddings=tied)
            weights, read, alive = dict(teacher.named_parameters()), [], []

            def get(name, weights=weights, read=read, alive=alive):
                """A copy; how many of those before still take memory goes to `alive`."""
                alive.append(sum(other() is not None for other in read))
                array = weights[name].detach().numpy().copy()
                read.append(weakref.ref(array))
                return torch.from_numpy(array)

            parted = shard(skeleton(teacher.config), get, torch.float32, world, offload=offload)
            whole = sum(parameter.nbytes for parameter in weights.values())
            apart = []
            for _ in range(2):
                for kind, make in (("distil", Whole), ("align", Align)):
                    losses, gradients = [], []
                    for goal in (teacher, parted):
                        student.zero_grad()
                        loss, _ = make(student, goal, stage(kind))(batch, 7)
                        loss.backward()
                        losses.append(loss.item())
                        gradients += [p.grad.clone() for p in student.parameters() if p.grad is not None]
                    half = len(gradients) // 2
                    apart += [abs(losses[0] - losses[1])]
                    apart += [
                        (a - b).abs().max().item() for a, b in zip(gradients[:half], gradients[half:], strict=True)
                    ]
            held = sum(p.nbytes for p in parted.parameters()) + parted.shards.num_bytes
            made = []

            def write(parted=parted, teacher=teacher, made=made, batch=batch):
                for model in (teacher, parted):
                    made.append(
                        model.generate(batch.input_ids[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
                    )
                return torch.equal(*made)

            same = parted.shards.once(write)
            ran = bool(made)
            try:
                parted.shards.once(lambda parted=parted: parted(batch.input_ids[:, :5]) and int("x"))
                failed = False
            except ValueError:
                failed = True
            try:
                parted.shards.once(lambda: (_ for _ in ()).throw(UserError("no")))
            except UserError:
                failed &= True
            again = Whole(student, parted, stage("distil"))(batch, 7)[0].item()
            results[tied, offload] = {
                "apart": max(apart), "share": held / whole, "same": same, "ran": ran, "failed": failed,
                "again": again - Whole(student, teacher, stage("distil"))(batch, 7)[0].item(), "reads": len(read),
                "tensors": len(weights), "alive": max(alive),
            }  # fmt: skip
    results["student"] = trained(world)
    results["cache"] = kept(world, f"{folder}/cache")
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def kept(world, folder: str) -> list[dict]:
    """What a cache of the teacher holds (`small_text.content`): written by this rank alone, by all, and by all with the
    teacher in parts. It is of three portions, so that a rank of two has none in the last round."""
    from pathlib import Path

    import torch
    from small_pair import VOCABULARY, pair
    from small_text import content, plan

    from convert.loading import skeleton
    from distill.logit_cache import PORTION, write_cache
    from distill.sharded import shard
    from distill.world import World

    teacher, found = pair()[0], []
    weights = dict(teacher.named_parameters())
    parted = shard(skeleton(teacher.config), lambda name: weights[name].detach().clone(), torch.float32, world)
    alone = World(0, 1, world.device)
    for place, model, who in (
        (f"alone{world.rank}", teacher, alone),
        ("all", teacher, world),
        ("parts", parted, world),
    ):
        options = {"made_by": "teacher", "top_k": 6, "vocab_size": VOCABULARY}
        found.append(content(write_cache(Path(folder) / place, plan(2 * PORTION + 5), model, who, **options)))
    return found


def still_whole(read: list, wanted: int = 1, patience: float = 2.0) -> int:
    """How many of the arrays read before still take memory. A broadcast's own thread lets go of its tensor some time
    after the broadcast is over, later on a busy machine: it is waited for."""
    until = time.monotonic() + patience
    while (count := sum(other() is not None for other in read)) > wanted and time.monotonic() < until:
        time.sleep(0.005)
    return count


def trained(world) -> dict:
    """A student that ZeRO 3 parts as it is read, against one that is whole first: losses of three steps, and all
    float32 masters at the end."""
    import torch
    from small_pair import pair, sequence, stage

    from convert.loading import skeleton
    from distill.batch import make_batch
    from distill.engine import Engine, EngineSettings
    from distill.sharded import partition
    from distill.stages import Whole

    found = {}
    for precision in ("fp32", "bf16"):
        settings, runs, alive, read = EngineSettings(3, precision), [], [], []
        for in_parts in (False, True):
            teacher, student = pair()
            weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
            source = None
            if in_parts:
                student = skeleton(student.config)

                def source(name, weights=weights, alive=alive, read=read):
                    alive.append(still_whole(read))
                    array = weights[name.removeprefix("student.")].numpy().copy()
                    read.append(weakref.ref(array))
                    return torch.from_numpy(array)

            for name, parameter in student.named_parameters():
                parameter.requires_grad_("mlp.up_proj" not in name)
            if precision == "bf16":
                teacher = teacher.bfloat16()
            module = Whole(student, teacher, stage("distil"))
            if in_parts:
                partition(module, source, settings)
                held = [p.ds_tensor.numel() for p in module.parameters()]
                share = sum(held) / sum(weight.numel() for weight in weights.values())
                left = sum(p.numel() for p in module.parameters())
            groups = [{"params": [p for p in module.parameters() if p.requires_grad], "lr": 1e-3, "weight_decay": 0.1}]
            engine = Engine(module, groups, settings, world, source)
            most = max(alive, default=0)
            losses = []
            for step in range(3):
                loss, _ = engine.forward(make_batch([sequence(2 * step + world.rank)]), 40)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            runs.append((losses, {name: tensor.clone() for name, tensor in engine.full_tensors()}))
            engine.close()
        (whole, masters), (parted, same) = runs
        found[precision] = {
            "losses": whole == parted,
            "masters": masters.keys() == same.keys() and all(torch.equal(masters[key], same[key]) for key in same),
            "share": share, "left": left, "alive": most,
        }  # fmt: skip
    return found

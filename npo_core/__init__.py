"""The method, without a scheduler: mixing, losses, the loop of one segment, the store, and the embedded testbed.

Legend of shapes, in tensor names and docstrings: P prompts, G rollouts a group, B = P·G rows, T tokens of a
completion, L tokens of a prompt, N tokens of a flat chunk, H hidden size, V vocabulary.

What lies where:

- the mathematics (numbers in, numbers out): advantages, losses, logprobs, mixing, groups, padding, streams, coverage,
  mismatch
- what evaluations say: scores, evaluated, benchmarks
- AutoNPO: monitor, tip, probe, signal, controller, confirm, explain, signal_study
- one segment and its engine: segment, engine, policy, lora, generate, learner, update, evaluate, memory,
  progress
- what engines' processes are run and asked by: supervised, frames
- vLLM: vllm_generator, vllm_process, vllm_worker, vllm_served, vllm_version, weight_sync
- DeepSpeed: deepspeed_learner, deepspeed_messages, deepspeed_rank, deepspeed_worker, launch, ranks, zero
- guides: guide, guide_sources, guide_files, shards
- data and answers: prompts, sources, room, stops, testbed, demonstrations, verifiers
- pictures in prompts: pictures, picture_files, vision, shapes
- a run and its tree of legs: begin, workspace, environment, run_config, artifacts, run_files, legs, checkpoints,
  lineage, faults
- the store: store, objects, s3, parquet, rows, overlay
- what is checked: redo, verify, verify_removals, findings
- what is swept: gc, debris, inventory, retention, tombstones, leases
- what is read and shown: views, trajectories, data_files, compare, export, report, markdown, trackers
- sizes and durations by arithmetic: estimate, durations, model_shape, known_models, plan
- what is looked at before a run begins: dry_run, checks, run_checks, model_check, machine_check
- interfaces between all of these, and the configuration's file: interfaces, config_file
"""

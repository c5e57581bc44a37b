# Stages 4 and 5: fine-tuning with or without GMPs, with either loss, and the test on the held-out utterances.
rule finetuning:
    input:
        utterances=rules.corpus.output.utterances,
        features=rules.local_features.output.features,
        encoder=start_of_finetuning,
        head=head_of_stage_1,
    output:
        config="<results>/finetuning/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}/config.json",
        encoder="<results>/finetuning/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}/model.safetensors",
        head="<results>/finetuning/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}/head.safetensors",
        history="<histories>/finetuning/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}.parquet",
        provenance="<provenance>/finetuning/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}.json",
    log:
        "<logs>/finetuning/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}.log",
    benchmark:
        "<benchmarks>/finetuning/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=16_000,
        runtime=240,
    params:
        config=settings("finetuning"),
        encoder=subpath(input.encoder, parent=True),
        head=lambda wildcards, input: str(Path(input.head).parent) if input.head else "none",
        folder=subpath(output.encoder, parent=True),
        code=code_hash("finetuning"),
    shell:
        "python -m gmp_atl finetuning --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --fold {wildcards.fold} --seed {wildcards.seed} --loss {wildcards.loss}"
        " --utterances {input.utterances} --local-features {input.features} --encoder {params.encoder}"
        " --multitask-head {params.head} --output {params.folder} --history {output.history}"
        " --checkpoint {params.folder}/checkpoint.safetensors --provenance {output.provenance} 2> {log}"


rule evaluation:
    input:
        utterances=rules.corpus.output.utterances,
        features=rules.local_features.output.features,
        encoder=rules.finetuning.output.encoder,
        head=rules.finetuning.output.head,
    output:
        predictions="<results>/evaluations/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}/predictions.parquet",
        metrics="<results>/evaluations/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}/metrics.json",
        provenance="<provenance>/evaluation/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}.json",
    log:
        "<logs>/evaluation/{variant}/gmps{gmps}/{loss}/fold{fold}/seed{seed}.log",
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=8_000,
        runtime=30,
    params:
        config=settings("evaluation"),
        fit_on=lambda wildcards: variant(wildcards.variant).clustering.fit_on,
        model=subpath(input.encoder, parent=True),
        code=code_hash("evaluation"),
    shell:
        "python -m gmp_atl evaluation --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --fold {wildcards.fold} --seed {wildcards.seed} --variant {wildcards.variant}"
        " --gmps {wildcards.gmps} --loss {wildcards.loss} --fit-on {params.fit_on} --utterances {input.utterances}"
        " --local-features {input.features} --model {params.model}"
        " --predictions {output.predictions} --metrics {output.metrics} --provenance {output.provenance} 2> {log}"

# Stage 1: HuBERT learns emotion and gender on the fold's training utterances.
rule multitask:
    input:
        utterances=rules.corpus.output.utterances,
        features=rules.local_features.output.features,
        encoder=rules.pretrained.output.encoder,
    output:
        config="<results>/multitask/{variant}/fold{fold}/seed{seed}/config.json",
        encoder="<results>/multitask/{variant}/fold{fold}/seed{seed}/model.safetensors",
        head="<results>/multitask/{variant}/fold{fold}/seed{seed}/head.safetensors",
        history="<histories>/multitask/{variant}/fold{fold}/seed{seed}.parquet",
        provenance="<provenance>/multitask/{variant}/fold{fold}/seed{seed}.json",
    log:
        "<logs>/multitask/{variant}/fold{fold}/seed{seed}.log",
    benchmark:
        "<benchmarks>/multitask/{variant}/fold{fold}/seed{seed}.tsv"
    conda:
        "../../envs/torch.yaml"
    threads: CONFIG.compute.threads
    resources:
        gpu=1,
        mem_mb=16_000,
        runtime=240,
    params:
        config=settings("multitask"),
        encoder=subpath(input.encoder, parent=True),
        folder=subpath(output.encoder, parent=True),
        code=code_hash("multitask"),
    shell:
        "python -m gmp_atl multitask --config {params.config:q} --threads {threads} --gpus {resources.gpu}"
        " --fold {wildcards.fold} --seed {wildcards.seed} --utterances {input.utterances}"
        " --local-features {input.features} --encoder {params.encoder} --output {params.folder}"
        " --history {output.history} --checkpoint {params.folder}/checkpoint.safetensors"
        " --provenance {output.provenance} 2> {log}"

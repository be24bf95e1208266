"""Does pre-training help? `python -m mcf.results alignment=FOLDER parsing=FOLDER` makes the table, and goes on with it.

    crops      of the training pictures of both sets, without their labels → shards          squares, mcf.pack
    teacher    stage one, half of the steps: MAE's pixel loss                                mcf.train
    mcf        stage two, the other half: the method, taught by stage one's encoder          mcf.train
    mae        the ablation: the pixel loss for as many steps as both stages                 mcf.train
    heads      on each frozen encoder and on a random one, from few labels, for both tasks   mcf.finetune
    table      mean, sample standard deviation and range over the seeds → results.md, results.csv

Every seed is a pre-training of its own (`one_pretraining=true`: the first alone is). What is finished is not done again;
what was cut off goes on.
"""

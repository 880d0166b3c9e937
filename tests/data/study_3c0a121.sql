BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE convfirst_alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT convfirst_alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "convfirst_alembic_version" VALUES('0004');
CREATE TABLE convfirst_baseline_latencies (
	baseline_latency_id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	device_id INTEGER NOT NULL, 
	engine VARCHAR(64) NOT NULL, 
	dtype VARCHAR(16) NOT NULL, 
	batch_size INTEGER NOT NULL, 
	resolution INTEGER NOT NULL, 
	threads INTEGER NOT NULL, 
	reason TEXT, 
	median_ms DOUBLE, 
	p20_ms DOUBLE, 
	p80_ms DOUBLE, 
	repeats INTEGER, 
	interval_share DOUBLE, 
	capped BOOLEAN, 
	throttled BOOLEAN, 
	measured_at DATETIME NOT NULL, 
	PRIMARY KEY (baseline_latency_id), 
	UNIQUE (study_id, name, device_id, engine, dtype, batch_size, resolution, threads), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id) ON DELETE CASCADE, 
	FOREIGN KEY(device_id) REFERENCES convfirst_devices (device_id)
);
CREATE TABLE convfirst_baseline_trainings (
	baseline_training_id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	name VARCHAR(128) NOT NULL, 
	resolution INTEGER NOT NULL, 
	steps INTEGER NOT NULL, 
	batch_size INTEGER NOT NULL, 
	learning_rate DOUBLE NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	summary TEXT NOT NULL, 
	trial INTEGER, 
	params BIGINT NOT NULL, 
	macs BIGINT NOT NULL, 
	classes INTEGER NOT NULL, 
	reason TEXT, 
	accuracy DOUBLE, 
	loss DOUBLE, 
	curve TEXT, 
	train_seconds DOUBLE, 
	finished_at DATETIME NOT NULL, 
	PRIMARY KEY (baseline_training_id), 
	UNIQUE (study_id, name, resolution, steps, batch_size, learning_rate), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id) ON DELETE CASCADE
);
CREATE TABLE convfirst_block_latencies (
	block_latency_id INTEGER NOT NULL, 
	device_id INTEGER NOT NULL, 
	engine VARCHAR(64) NOT NULL, 
	dtype VARCHAR(16) NOT NULL, 
	batch_size INTEGER NOT NULL, 
	threads INTEGER NOT NULL, 
	kernels VARCHAR(12) NOT NULL, 
	shape_id VARCHAR(12) NOT NULL, 
	shape TEXT NOT NULL, 
	median_ms DOUBLE NOT NULL, 
	p20_ms DOUBLE NOT NULL, 
	p80_ms DOUBLE NOT NULL, 
	repeats INTEGER NOT NULL, 
	interval_share DOUBLE NOT NULL, 
	capped BOOLEAN NOT NULL, 
	throttled BOOLEAN, 
	measured_at DATETIME NOT NULL, 
	PRIMARY KEY (block_latency_id), 
	UNIQUE (device_id, engine, dtype, batch_size, threads, kernels, shape_id), 
	FOREIGN KEY(device_id) REFERENCES convfirst_devices (device_id)
);
INSERT INTO "convfirst_block_latencies" VALUES(1,1,'torchscript','float32',1,1,'','5526d3caa62d','{"classes":10,"kind":"network","name":"hard_swish stem 24 | 2x24 k5 g8 e3 | 2x48/2 k5 g8 e4 | 2x96/2 k5 g16 e4 | head 384","size":32}',8.75696171667115219605e-01,4.88274505959324645054e-01,2.57238832378219228758e+00,715,2.87808710004172872698e-02,0,NULL,'2026-11-29 13:19:44.935972');
INSERT INTO "convfirst_block_latencies" VALUES(2,1,'torchscript','float32',1,1,'','44ddf773587a','{"activation":"silu","group_width":1,"hidden":16,"into":16,"kernel_size":3,"kind":"convfirst","out":24,"size":16,"stride":2}',6.64462147860769292151e-02,1.97759843060880853571e-02,8.85710691458450605217e-02,248,5.03631659000460668584e-02,1,NULL,'2026-11-29 13:32:03.816781');
INSERT INTO "convfirst_block_latencies" VALUES(3,1,'torchscript','float32',1,1,'','502394e31322','{"activation":"silu","group_width":1,"hidden":16,"into":16,"kernel_size":3,"kind":"convfirst","out":16,"size":16,"stride":1}',7.07783734215053639271e-02,2.07864284995884461559e-02,2.5609510299366733399e-01,248,1.16696690798415630974e-01,1,NULL,'2026-11-29 13:32:03.824726');
INSERT INTO "convfirst_block_latencies" VALUES(4,1,'torchscript','float32',1,1,'','67091fd40922','{"activation":"silu","kind":"stem","out":16,"size":32}',2.37422279588798100513e-02,7.53978088948972606508e-03,4.8498909506044456108e-02,248,0.0826848854047084,1,NULL,'2026-11-29 13:32:03.832565');
INSERT INTO "convfirst_block_latencies" VALUES(5,1,'torchscript','float32',1,1,'','b69687e87748','{"activation":"silu","hidden":128,"into":48,"kind":"head","out":10,"size":4}',1.60908053533856849892e-02,0.00467849789808628,6.88175794435973847695e-02,248,4.72897592653624465608e-01,1,NULL,'2026-11-29 13:32:03.833251');
INSERT INTO "convfirst_block_latencies" VALUES(6,1,'torchscript','float32',1,1,'','dffbb1619719','{"kind":"call"}',1.56280161328228653361e-02,1.56280161328228653361e-02,1.56280161328228653361e-02,215,1.07156439720122942382e+00,0,NULL,'2026-11-29 13:32:03.833821');
INSERT INTO "convfirst_block_latencies" VALUES(7,1,'torchscript','float32',1,1,'','f3cceeea566e','{"activation":"silu","group_width":1,"hidden":24,"into":24,"kernel_size":3,"kind":"convfirst","out":48,"size":8,"stride":2}',6.37715484599835485957e-02,1.85646478932280194207e-02,9.52622721555044238428e-02,248,6.08157909942462771013e-02,1,NULL,'2026-11-29 13:32:03.834324');
INSERT INTO "convfirst_block_latencies" VALUES(8,1,'torchscript','float32',1,1,'','1d8e12362a4d','{"activation":"gelu","group_width":8,"hidden":288,"into":96,"kernel_size":3,"kind":"convfirst","out":96,"size":4,"stride":1}',1.0894182557941285705e-01,5.70005043114025222728e-02,5.1737255003438087364e-01,243,1.50956007330035224534e-01,1,NULL,'2026-11-29 13:32:20.115208');
INSERT INTO "convfirst_block_latencies" VALUES(9,1,'torchscript','float32',1,1,'','60ad354c13a3','{"activation":"gelu","kind":"stem","out":16,"size":32}',2.70635559620314956885e-02,1.03021978422564164379e-02,1.07148594581789213808e-01,243,4.92271717868167438258e-02,0,NULL,'2026-11-29 13:32:20.115871');
INSERT INTO "convfirst_block_latencies" VALUES(10,1,'torchscript','float32',1,1,'','6af0d86e3ace','{"activation":"gelu","hidden":384,"into":96,"kind":"head","out":10,"size":4}',3.5473456448562513954e-02,4.11024482369199816583e-03,0.532394286529025,77,1.5727734705104652324e+00,1,NULL,'2026-11-29 13:32:20.116372');
INSERT INTO "convfirst_block_latencies" VALUES(11,1,'torchscript','float32',1,1,'','8cefeef9d399','{"activation":"gelu","group_width":8,"hidden":64,"into":32,"kernel_size":3,"kind":"convfirst","out":32,"size":16,"stride":1}',1.39409386168207527489e-01,8.10537464472475266408e-02,4.87454422370246442941e-01,243,2.13695396220471761639e-01,1,NULL,'2026-11-29 13:32:20.116940');
INSERT INTO "convfirst_block_latencies" VALUES(12,1,'torchscript','float32',1,1,'','b6a3d5eeda7e','{"activation":"gelu","group_width":8,"hidden":128,"into":32,"kernel_size":7,"kind":"convfirst","out":56,"size":16,"stride":2}',1.25150322222647186753e-01,7.58305788538593816827e-02,1.97329040547782691428e-01,243,1.70008563386902122882e-01,1,NULL,'2026-11-29 13:32:20.155491');
INSERT INTO "convfirst_block_latencies" VALUES(13,1,'torchscript','float32',1,1,'','c35b1efac750','{"activation":"gelu","group_width":8,"hidden":32,"into":16,"kernel_size":3,"kind":"convfirst","out":32,"size":16,"stride":1}',9.45974188013153638454e-02,6.40355674832847748811e-02,1.38555023463644677583e-01,243,9.3466963364462044006e-02,1,NULL,'2026-11-29 13:32:20.156149');
INSERT INTO "convfirst_block_latencies" VALUES(14,1,'torchscript','float32',1,1,'','e6128af23816','{"activation":"gelu","group_width":8,"hidden":168,"into":56,"kernel_size":3,"kind":"convfirst","out":96,"size":8,"stride":2}',8.78770471126031765818e-02,0.0676366433006086,1.58512969146111154516e-01,243,4.62798222712485773921e-02,0,NULL,'2026-11-29 13:32:20.156623');
INSERT INTO "convfirst_block_latencies" VALUES(15,1,'torchscript','float32',1,1,'','56feb78e14fe','{"activation":"hard_swish","kind":"stem","out":24,"size":32}',2.57668513739898151493e-02,1.0718633628280325315e-02,1.10672076331339033772e-01,215,1.00523657070382813061e-01,1,NULL,'2026-11-29 13:34:00.308090');
INSERT INTO "convfirst_block_latencies" VALUES(16,1,'torchscript','float32',1,1,'','60edd25124ef','{"activation":"hard_swish","group_width":16,"hidden":384,"into":96,"kernel_size":5,"kind":"convfirst","out":96,"size":4,"stride":1}',1.08862001220722745542e-01,7.73541930043805253669e-02,7.76957908826883869579e-01,215,4.20479507449707190502e-01,1,NULL,'2026-11-29 13:34:00.308843');
INSERT INTO "convfirst_block_latencies" VALUES(17,1,'torchscript','float32',1,1,'','79018578d165','{"activation":"hard_swish","group_width":8,"hidden":192,"into":48,"kernel_size":5,"kind":"convfirst","out":48,"size":8,"stride":1}',1.29469383292988848843e-01,0.0756245322062681,4.34562994762322296615e-01,215,2.67368012891976425393e-01,1,NULL,'2026-11-29 13:34:00.326097');
INSERT INTO "convfirst_block_latencies" VALUES(18,1,'torchscript','float32',1,1,'','902b95495e19','{"activation":"hard_swish","hidden":384,"into":96,"kind":"head","out":10,"size":4}',1.99957517981734812784e-02,3.42929585654157698809e-03,1.81901511819017230875e-01,127,7.90041034674453634956e-01,1,NULL,'2026-11-29 13:34:00.326904');
INSERT INTO "convfirst_block_latencies" VALUES(19,1,'torchscript','float32',1,1,'','a781b4c1b3df','{"activation":"hard_swish","group_width":8,"hidden":96,"into":24,"kernel_size":5,"kind":"convfirst","out":48,"size":16,"stride":2}',7.65926144495173572002e-02,4.37044883272830822495e-02,3.61376570154459397787e-01,215,1.35246633298862328764e-01,1,NULL,'2026-11-29 13:34:00.327537');
INSERT INTO "convfirst_block_latencies" VALUES(20,1,'torchscript','float32',1,1,'','c9accbcf5ab0','{"activation":"hard_swish","group_width":8,"hidden":72,"into":24,"kernel_size":5,"kind":"convfirst","out":24,"size":16,"stride":1}',1.42948357241518941851e-01,8.56364177053466624212e-02,3.87200634258922260499e-01,215,3.10868932005337328394e-01,1,NULL,'2026-11-29 13:34:00.328243');
INSERT INTO "convfirst_block_latencies" VALUES(21,1,'torchscript','float32',1,1,'','fc12d95b0470','{"activation":"hard_swish","group_width":16,"hidden":192,"into":48,"kernel_size":5,"kind":"convfirst","out":96,"size":8,"stride":2}',8.29185952265708431374e-02,6.75703987495931412965e-02,1.50326997760153152627e-01,215,1.09724775046613029494e-01,1,NULL,'2026-11-29 13:34:00.328687');
CREATE TABLE convfirst_candidates (
	trial_id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	arch_id VARCHAR(12) NOT NULL, 
	arch TEXT NOT NULL, 
	summary TEXT NOT NULL, 
	params BIGINT NOT NULL, 
	macs BIGINT NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	reason TEXT, 
	seed BIGINT NOT NULL, 
	accuracy DOUBLE, 
	loss DOUBLE, 
	train_seconds DOUBLE, 
	train_memory_bytes BIGINT, 
	latency_seconds DOUBLE, 
	total_seconds DOUBLE NOT NULL, 
	finished_at DATETIME NOT NULL, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id) ON DELETE CASCADE, 
	FOREIGN KEY(study_id) REFERENCES studies (study_id) ON DELETE CASCADE
);
INSERT INTO "convfirst_candidates" VALUES(1,1,0,'8f3f122471c3','{"activation":"silu","head_width":128,"stages":[{"blocks":1,"expansion":1.0,"group_width":1,"kernel_size":3,"stride":1,"width":16},{"blocks":1,"expansion":1.0,"group_width":1,"kernel_size":3,"stride":2,"width":24},{"blocks":1,"expansion":1.0,"group_width":1,"kernel_size":3,"stride":2,"width":48}],"stem_width":16}','silu stem 16 | 1x16 k3 g1 e1 | 1x24/2 k3 g1 e1 | 1x48/2 k3 g1 e1 | head 128',11810,367232,'complete',NULL,0,3.65666666666666639873e-01,1.79952880859375,1.12230551800000739599e+01,7259440,3.92131158199981655343e+00,1.51587253130001045065e+01,'2026-11-29 13:21:17.575827');
INSERT INTO "convfirst_candidates" VALUES(2,1,1,'85ac66428731','{"activation":"hard_swish","head_width":384,"stages":[{"blocks":2,"expansion":3.0,"group_width":8,"kernel_size":5,"stride":1,"width":24},{"blocks":2,"expansion":4.0,"group_width":8,"kernel_size":5,"stride":2,"width":48},{"blocks":2,"expansion":4.0,"group_width":16,"kernel_size":5,"stride":2,"width":96}],"stem_width":24}','hard_swish stem 24 | 2x24 k5 g8 e3 | 2x48/2 k5 g8 e4 | 2x96/2 k5 g16 e4 | head 384',260242,9520896,'complete',NULL,0,0.735,0.8729267578125,1.14391102327999988124e+02,39353136,3.95781273279999368241e+01,1.5589721156099994914e+02,'2026-11-29 13:23:53.544329');
INSERT INTO "convfirst_candidates" VALUES(4,1,3,'6ddb9cfb25a7','{"activation":"relu","head_width":128,"stages":[{"blocks":2,"expansion":3.0,"group_width":16,"kernel_size":5,"stride":1,"width":32},{"blocks":1,"expansion":2.0,"group_width":32,"kernel_size":3,"stride":2,"width":64},{"blocks":3,"expansion":4.0,"group_width":32,"kernel_size":5,"stride":2,"width":64}],"stem_width":16}','relu stem 16 | 2x32 k5 g16 e3 | 1x64/2 k3 g32 e2 | 3x64/2 k5 g32 e4 | head 128',308122,12211456,'complete',NULL,0,0.677,1.03234855143229165008e+00,1.4716922654000018155e+02,26596784,5.93007833000001483014e+00,1.55879344568999840701e+02,'2026-11-29 13:29:14.873029');
INSERT INTO "convfirst_candidates" VALUES(5,1,4,'834d40067b5d','{"activation":"gelu","head_width":384,"stages":[{"blocks":2,"expansion":2.0,"group_width":8,"kernel_size":3,"stride":1,"width":32},{"blocks":1,"expansion":4.0,"group_width":8,"kernel_size":7,"stride":2,"width":56},{"blocks":2,"expansion":3.0,"group_width":8,"kernel_size":3,"stride":2,"width":96}],"stem_width":16}','gelu stem 16 | 2x32 k3 g8 e2 | 1x56/2 k7 g8 e4 | 2x96/2 k3 g8 e3 | head 384',168682,5469952,'complete',NULL,0,7.09333333333333371228e-01,0.929621337890625,7.78093580070001280537e+01,28638960,4.43841957499989803181e+00,8.23066131010000390233e+01,'2026-11-29 13:30:39.014954');
CREATE TABLE convfirst_devices (
	device_id INTEGER NOT NULL, 
	kind VARCHAR(64) NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	driver VARCHAR(256) NOT NULL, 
	torch VARCHAR(64) NOT NULL, 
	triton VARCHAR(64) NOT NULL, 
	PRIMARY KEY (device_id), 
	UNIQUE (kind, name, driver, torch, triton)
);
INSERT INTO "convfirst_devices" VALUES(1,'cpu','AMD EPYC','Linux x86_64, 2 CPUs','2.11.0+cu130','3.6.0');
CREATE TABLE convfirst_latencies (
	latency_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	device_id INTEGER NOT NULL, 
	engine VARCHAR(64) NOT NULL, 
	dtype VARCHAR(16) NOT NULL, 
	batch_size INTEGER NOT NULL, 
	resolution INTEGER NOT NULL, 
	threads INTEGER NOT NULL, 
	stage VARCHAR(16) DEFAULT 'search' NOT NULL, 
	median_ms DOUBLE NOT NULL, 
	p20_ms DOUBLE NOT NULL, 
	p80_ms DOUBLE NOT NULL, 
	repeats INTEGER NOT NULL, 
	interval_share DOUBLE, 
	capped BOOLEAN, 
	raw_median_ms DOUBLE NOT NULL, 
	anchor_median_ms DOUBLE NOT NULL, 
	weight_bytes BIGINT NOT NULL, 
	workspace_bytes BIGINT NOT NULL, 
	throttled BOOLEAN, 
	sm_clock_mhz DOUBLE, 
	temperature_c DOUBLE, 
	over_limit BOOLEAN DEFAULT 0 NOT NULL, 
	measured_at DATETIME NOT NULL, 
	PRIMARY KEY (latency_id), 
	UNIQUE (trial_id, device_id, engine, dtype, batch_size, resolution, threads, stage), 
	FOREIGN KEY(trial_id) REFERENCES convfirst_candidates (trial_id) ON DELETE CASCADE, 
	FOREIGN KEY(device_id) REFERENCES convfirst_devices (device_id)
);
INSERT INTO "convfirst_latencies" VALUES(1,1,1,'torchscript','float32',1,32,1,'search',2.84268397648780757336e-01,1.57639250858352397699e-01,5.09363469028365711821e-01,103,4.39328771060771630652e-02,0,2.41389763154505720965e-01,7.37114307692256498505e-01,46376,49152,NULL,NULL,NULL,0,'2026-11-29 13:21:17.581851');
INSERT INTO "convfirst_latencies" VALUES(2,2,1,'torchscript','float32',1,32,1,'search',8.39717471402968596017e-01,6.14968451719544728639e-01,1.12778369995756166943e+00,112,2.90854976773204765283e-01,1,1.1341067083302882601e+00,0.963637666675115,1034440,165888,NULL,NULL,NULL,0,'2026-11-29 13:23:53.544910');
INSERT INTO "convfirst_latencies" VALUES(3,4,1,'torchscript','float32',1,32,1,'search',8.91957791539917943524e-01,6.36348580219118220568e-01,1.17549433228495692205e+00,124,9.76448267936679270562e-02,1,8.51533818180624568761e-01,8.58921624995900856447e-01,1226152,233496,NULL,NULL,NULL,0,'2026-11-29 13:29:14.887300');
INSERT INTO "convfirst_latencies" VALUES(4,5,1,'torchscript','float32',1,32,1,'search',7.65367833203651426465e-01,5.3777273645827550208e-01,8.13160361126242237084e-01,143,9.73589607642185855818e-02,1,6.92115583338666850998e-01,7.82221833333096583373e-01,669768,163840,NULL,NULL,NULL,0,'2026-11-29 13:30:39.015537');
INSERT INTO "convfirst_latencies" VALUES(5,1,1,'torchscript','float32',1,32,1,'final',2.98394526132186643785e-01,2.07085006568622220779e-01,3.96377330715987519216e-01,162,7.8255606360351143147e-02,1,2.74082546873444243828e-01,1.10728808332775452427e+00,46376,49152,NULL,NULL,NULL,0,'2026-11-29 13:30:51.124063');
INSERT INTO "convfirst_latencies" VALUES(6,2,1,'torchscript','float32',1,32,1,'final',8.78578736202104249031e-01,0.599489885518616,1.31372118220905420571e+00,162,1.22694816091344555131e-01,1,1.10676975000008814831e+00,1.10728808332775452427e+00,1034440,165888,NULL,NULL,NULL,0,'2026-11-29 13:30:51.133417');
INSERT INTO "convfirst_latencies" VALUES(7,5,1,'torchscript','float32',1,32,1,'final',7.09027640091588251536e-01,4.97641038790072709474e-01,1.01546084235685252217e+00,162,3.77028443995866616167e-02,0,8.93143099998875866774e-01,1.10728808332775452427e+00,669768,163840,NULL,NULL,NULL,0,'2026-11-29 13:30:51.134268');
CREATE TABLE convfirst_learning_curves (
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	train_loss DOUBLE NOT NULL, 
	train_accuracy DOUBLE NOT NULL, 
	seconds DOUBLE NOT NULL, 
	PRIMARY KEY (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES convfirst_candidates (trial_id) ON DELETE CASCADE
);
INSERT INTO "convfirst_learning_curves" VALUES(1,10,2.31371045112609863281e+00,1.03124998509883880615e-01,5.99168223800006671808e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,20,2.32147860527038574218e+00,0.109375,6.25467107700001179182e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,30,2.32728552818298339843e+00,0.109375,6.57123728500005199748e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,40,2.32910776138305664062e+00,9.68749970197677612304e-02,6.90470448399992164922e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,50,2.29896950721740722656e+00,1.34375005960464477539e-01,7.05935722000003806897e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,60,2.25938677787780761718e+00,1.68750002980232238769e-01,7.36196464799991190375e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,70,2.21012234687805175781e+00,2.12500005960464477539e-01,7.48329219900006137322e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,80,2.13845229148864746093e+00,2.53125011920928955078e-01,7.74680380399991);
INSERT INTO "convfirst_learning_curves" VALUES(1,90,2.09474897384643554687e+00,2.3749999701976776123e-01,7.93772001799993631721e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,100,2.10514950752258300781e+00,2.5624999403953552246e-01,8.1441857719999);
INSERT INTO "convfirst_learning_curves" VALUES(1,110,2.05278921127319335937e+00,0.296875,8.2468527190001168492e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,120,2.03479123115539550781e+00,0.265625,8.57836017399995398591e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,130,1.98950409889221191406e+00,0.328125,8.69842540900003768911e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,140,1.98390126228332519531e+00,2.8749999403953552246e-01,9.06398471000011340947e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,150,1.95055222511291503906e+00,3.9687499403953552246e-01,9.26846644300008);
INSERT INTO "convfirst_learning_curves" VALUES(1,160,1.95028758049011230468e+00,3.15625011920928955078e-01,9.65569531899996);
INSERT INTO "convfirst_learning_curves" VALUES(1,170,1.84118723869323730468e+00,3.9687499403953552246e-01,9.81669604100011383707e+00);
INSERT INTO "convfirst_learning_curves" VALUES(1,180,1.9335161447525024414e+00,3.40624988079071044921e-01,1.00626515010001185148e+01);
INSERT INTO "convfirst_learning_curves" VALUES(1,190,1.91998028755187988281e+00,3.53125005960464477539e-01,1.03526478230000975602e+01);
INSERT INTO "convfirst_learning_curves" VALUES(1,200,1.91033959388732910156e+00,3.15625011920928955078e-01,1.06609315089999654444e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,10,2.40318965911865234375e+00,9.68749970197677612304e-02,1.31030217820000416395e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,20,2.441661834716796875e+00,0.125,2.14470588829999542213e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,30,2.40407586097717285156e+00,1.6249999403953552246e-01,2.38617633970000042609e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,40,2.23851633071899414062e+00,2.0624999701976776123e-01,2.90696519489999900542e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,50,2.1651020050048828125e+00,2.78124988079071044921e-01,3.33898514420000083182e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,60,1.96617794036865234375e+00,3.37500005960464477539e-01,4.39915324690000488763e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,70,1.90773046016693115234e+00,3.6562499403953552246e-01,5.58064636569999947832e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,80,1.82734036445617675781e+00,4.1249999403953552246e-01,5.87918775959999493361e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,90,1.80279123783111572265e+00,4.25000011920928955078e-01,6.24050123629999688992e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,100,1.58969950675964355468e+00,5.24999976158142089843e-01,6.48320034769999438157e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,110,1.64029788970947265625e+00,0.53125,70.098996682);
INSERT INTO "convfirst_learning_curves" VALUES(2,120,1.64210987091064453125e+00,4.65624988079071044921e-01,7.3568090344999973241e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,130,1.483318328857421875e+00,5.68750023841857910156e-01,7.77333438220000516594e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,140,1.45235610008239746093e+00,5.84375023841857910156e-01,8.32489758619999520306e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,150,1.431026458740234375e+00,6.34374976158142089843e-01,93.1249501929999);
INSERT INTO "convfirst_learning_curves" VALUES(2,160,1.29676425457000732421e+00,6.96874976158142089843e-01,9.55999077819999456585e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,170,1.23552179336547851562e+00,0.703125,9.72649917139999615773e+01);
INSERT INTO "convfirst_learning_curves" VALUES(2,180,1.2230930328369140625e+00,0.734375,1.00162578700000040046e+02);
INSERT INTO "convfirst_learning_curves" VALUES(2,190,1.28735697269439697265e+00,0.668749988079071,1.03641545836999966919e+02);
INSERT INTO "convfirst_learning_curves" VALUES(2,200,1.21661782264709472656e+00,6.78125023841857910156e-01,1.06012980382000023384e+02);
INSERT INTO "convfirst_learning_curves" VALUES(4,10,2.39852190017700195312e+00,1.21875002980232238769e-01,2.12274128220001330187e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,20,2.39856457710266113281e+00,1.06250002980232238769e-01,2.62212071790002028133e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,30,2.41487360000610351562e+00,8.43750014901161193847e-02,3.45947171870000147464e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,40,2.47341036796569824218e+00,0.140625,4.33351202240000930041e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,50,2.35447025299072265625e+00,1.3124999403953552246e-01,5.61230094260001806123e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,60,2.19276380538940429687e+00,2.2499999403953552246e-01,6.69372255660000519111e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,70,2.00087428092956542968e+00,3.1874999403953552246e-01,6.7755344379000007394e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,80,1.89262270927429199218e+00,3.87499988079071044921e-01,6.95048522760000651041e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,90,1.95680463314056396484e+00,0.34375,7.07208403450001696919e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,100,1.82987904548645019531e+00,0.421875,7.26336571020001429141e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,110,1.7899042367935180664e+00,0.4375,7.34160717270001441639e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,120,1.73674046993255615234e+00,4.1249999403953552246e-01,7.50345543190001080819e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,130,1.62875330448150634765e+00,4.9062499403953552246e-01,8.36016615690000435261e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,140,1.57060956954956054687e+00,5.21875023841857910156e-01,9.25478841610001836705e+01);
INSERT INTO "convfirst_learning_curves" VALUES(4,150,1.56042313575744628906e+00,0.565625011920929,1.00099125119000063931e+02);
INSERT INTO "convfirst_learning_curves" VALUES(4,160,1.45260739326477050781e+00,6.00000023841857910156e-01,1.01537178432000018801e+02);
INSERT INTO "convfirst_learning_curves" VALUES(4,170,1.32691133022308349609e+00,6.18749976158142089843e-01,1.04886393191000024669e+02);
INSERT INTO "convfirst_learning_curves" VALUES(4,180,1.3776518106460571289e+00,0.643750011920929,1.09602872842000124368e+02);
INSERT INTO "convfirst_learning_curves" VALUES(4,190,1.50178122520446777343e+00,0.528124988079071,1.21971464952000133055e+02);
INSERT INTO "convfirst_learning_curves" VALUES(4,200,1.35232043266296386718e+00,0.612500011920929,130.935009241);
INSERT INTO "convfirst_learning_curves" VALUES(5,10,2.39129495620727539062e+00,7.50000029802322387695e-02,7.12358000299991545034e+00);
INSERT INTO "convfirst_learning_curves" VALUES(5,20,2.43091654777526855468e+00,1.00000001490116119384e-01,9.10650406600007);
INSERT INTO "convfirst_learning_curves" VALUES(5,30,2.44601178169250488281e+00,1.2812499701976776123e-01,1.20373768389999895593e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,40,2.35524702072143554687e+00,1.4687499403953552246e-01,1.48017411579999134119e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,50,2.26930189132690429687e+00,2.28125005960464477539e-01,1.64154124890001185121e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,60,2.15045166015625,0.296875,1.76482964050001100986e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,70,1.99607443809509277343e+00,3.15625011920928955078e-01,2.01499562389999482543e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,80,1.91032445430755615234e+00,0.359375,2.26395949929999460445e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,90,1.84383106231689453125e+00,0.390625,3.09855993090000083603e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,100,1.7086931467056274414e+00,0.5,3.5106934706999936679e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,110,1.71032750606536865234e+00,4.46875005960464477539e-01,3.60496979540000666024e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,120,1.63312983512878417968e+00,5.21875023841857910156e-01,3.87322874690000844566e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,130,1.5333766937255859375e+00,0.546875,4.49614765050000642077e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,140,1.45012009143829345703e+00,5.53125023841857910156e-01,4.62491798569999446044e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,150,1.45157635211944580078e+00,6.03124976158142089843e-01,4.85110739589999866421e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,160,1.36366629600524902343e+00,6.34374976158142089843e-01,5.12042679850001150035e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,170,1.27586412429809570312e+00,0.684374988079071,5.39131443710000439733e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,180,1.25767397880554199218e+00,6.81249976158142089843e-01,6.22603374410000469634e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,190,1.36577188968658447265e+00,6.65624976158142089843e-01,6.74120802659999753805e+01);
INSERT INTO "convfirst_learning_curves" VALUES(5,200,1.2520891427993774414e+00,0.703125,6.91037292860000889032e+01);
CREATE TABLE convfirst_profiles (
	profile_id INTEGER NOT NULL, 
	device_id INTEGER NOT NULL, 
	dtype VARCHAR(16) NOT NULL, 
	threads INTEGER NOT NULL, 
	copy_bytes_per_s DOUBLE NOT NULL, 
	macs_per_s DOUBLE NOT NULL, 
	launch_seconds DOUBLE NOT NULL, 
	graph_launch_seconds DOUBLE, 
	network_yardstick_ms DOUBLE NOT NULL, 
	product_yardstick_ms DOUBLE NOT NULL, 
	interval_share DOUBLE NOT NULL, 
	throttled BOOLEAN, 
	measured_at DATETIME NOT NULL, 
	PRIMARY KEY (profile_id), 
	UNIQUE (device_id, dtype, threads), 
	FOREIGN KEY(device_id) REFERENCES convfirst_devices (device_id)
);
INSERT INTO "convfirst_profiles" VALUES(1,1,'float32',1,1.6040825122702657699e+10,3.19968054743621368399e+10,2.78587748787346762679e-06,NULL,1.41313287500111073313e+00,2.05019499998115861671e+00,1.39802378846311325943e+00,NULL,'2026-11-29 13:19:32.413157');
CREATE TABLE convfirst_retrainings (
	retraining_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	data TEXT NOT NULL, 
	data_fingerprint VARCHAR(12) NOT NULL, 
	resolution INTEGER NOT NULL, 
	steps INTEGER NOT NULL, 
	batch_size INTEGER NOT NULL, 
	learning_rate DOUBLE NOT NULL, 
	seed BIGINT NOT NULL, 
	reason TEXT, 
	accuracy DOUBLE, 
	loss DOUBLE, 
	curve TEXT, 
	train_seconds DOUBLE, 
	finished_at DATETIME NOT NULL, 
	PRIMARY KEY (retraining_id), 
	UNIQUE (trial_id, data_fingerprint, resolution, steps, batch_size, learning_rate, seed), 
	FOREIGN KEY(trial_id) REFERENCES convfirst_candidates (trial_id) ON DELETE CASCADE
);
CREATE TABLE convfirst_studies (
	study_id INTEGER NOT NULL, 
	config TEXT NOT NULL, 
	data_fingerprint TEXT NOT NULL, 
	versions TEXT NOT NULL, 
	device_id INTEGER NOT NULL, 
	anchor TEXT NOT NULL, 
	anchor_ms DOUBLE NOT NULL, 
	created_at DATETIME NOT NULL, 
	owner TEXT, 
	PRIMARY KEY (study_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id) ON DELETE CASCADE, 
	FOREIGN KEY(device_id) REFERENCES convfirst_devices (device_id)
);
INSERT INTO "convfirst_studies" VALUES(1,'{"space": {"name": "small", "description": "ConvFirst networks for images of 32 to 64 pixels; total stride 8.", "resolution": 32, "stem_width": [16, 24, 32], "head_width": [128, 256, 384, 512], "activation": ["silu", "relu", "hard_swish", "gelu"], "stages": [{"width": [16, 24, 32], "kernel_size": [3, 5, 7], "group_width": [1, 8, 16], "expansion": [1.0, 2.0, 3.0, 4.0], "blocks": [1, 2], "stride": [1]}, {"width": [24, 32, 40, 48, 56, 64], "kernel_size": [3, 5, 7], "group_width": [1, 8, 16, 32], "expansion": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "blocks": [1, 2, 3], "stride": [2]}, {"width": [48, 64, 80, 96, 112, 128], "kernel_size": [3, 5, 7], "group_width": [1, 8, 16, 32], "expansion": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "blocks": [1, 2, 3], "stride": [2]}]}, "data": {"source": "digits", "resolution": 32}, "proxy": {"steps": 200, "batch_size": 32, "learning_rate": 0.008, "weight_decay": 0.02, "betas": [0.9, 0.98], "warmup": 0.2, "label_smoothing": 0.1, "threads": 2, "deterministic": false}, "latency": {"device": "cpu", "engine": "torchscript", "dtype": "float32", "batch_size": 1, "resolution": 32, "num_classes": 10, "threads": 1, "precision": 0.05, "seconds": 3.0}, "limits": {"latency_ms": null, "params": null, "macs": null, "memory_mb": null}, "sampler": "tpe", "seed": 0}','1e1f4a0eef45','{"python": "3.11.7", "convfirst-nas": "0.1.0", "torch": "2.11.0", "torchvision": "0.26.0", "triton": "3.6.0", "timm": "1.0.31", "optuna": "5.0.0", "numpy": "2.4.6", "scikit-learn": "1.9.1"}',1,'{"activation":"hard_swish","head_width":384,"stages":[{"blocks":2,"expansion":3.0,"group_width":8,"kernel_size":5,"stride":1,"width":24},{"blocks":2,"expansion":4.0,"group_width":8,"kernel_size":5,"stride":2,"width":48},{"blocks":2,"expansion":4.0,"group_width":16,"kernel_size":5,"stride":2,"width":96}],"stem_width":24}',8.75696171667115219605e-01,'2026-11-29 13:21:01.234554',NULL);
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'convfirst');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MAXIMIZE',1,0);
INSERT INTO "study_directions" VALUES(2,'MINIMIZE',1,1);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_system_attributes" VALUES(1,1,'study:metric_names','["accuracy", "latency_ms"]');
INSERT INTO "study_system_attributes" VALUES(2,1,'dashboard:note_str:0','"Search for ConvFirst networks, study `convfirst`.\n\n| what | how |\n| --- | --- |\n| objectives | accuracy of the proxy training (up), latency of the deployment in ms (down) |\n| data | digits, 32x32 |\n| training | 200 steps of 32, AdamW, peak learning rate 0.008, 2 thread(s) |\n| latency | torchscript, float32, batch 1, 32x32, 10 classes, 1 CPU thread(s); medians, corrected for drift by the anchor |\n| device | AMD EPYC (Linux x86_64, 2 CPUs) |\n| anchor | `hard_swish stem 24 \\| 2x24 k5 g8 e3 \\| 2x48/2 k5 g8 e4 \\| 2x96/2 k5 g16 e4 \\| head 384`, 0.8757 ms |\n| limits | none |\n| sampler | tpe, seed 0 |\n| space | small |\n| versions | python 3.11.7, convfirst-nas 0.1.0, torch 2.11.0, torchvision 0.26.0, triton 3.6.0, timm 1.0.31, optuna 5.0.0, numpy 2.4.6, scikit-learn 1.9.1 |\n| begun | 2026-11-29 13:21 UTC |\n\nPruned trials broke a limit or proposed what was known already, failed ones could not run; user attributes and notes tell why. The front is also the view `pareto_front` of this database; its latencies were measured again at the end of the search, so that they may differ from the objective of the same trial."');
INSERT INTO "study_system_attributes" VALUES(3,1,'dashboard:note_ver','1');
INSERT INTO "study_system_attributes" VALUES(4,1,'dashboard:1:note_str:0','"`silu stem 16 | 1x16 k3 g1 e1 | 1x24/2 k3 g1 e1 | 1x48/2 k3 g1 e1 | head 128`\n\n**complete**  \naccuracy 36.57% after 200 steps  \nlatency 0.2984 ms (p20 to p80: 0.2071 to 0.3964; 95 % interval of the median 7.8% wide), measured in turns with the rest of the front; ended by the time cap\n\n| stage | blocks | kernel | group width | expansion | width | stride | output | MMACs | params k |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n| stem | 1 | 3x3 | full |  | 16 | 2 | 16x16 | 0.11 | 0.5 |\n| 1 | 1 | 3x3 | 1 | 1 | 16 | 1 | 16x16 | 0.17 | 0.8 |\n| 2 | 1 | 3x3 | 1 | 1 | 24 | 2 | 8x8 | 0.05 | 0.9 |\n| 3 | 1 | 3x3 | 1 | 1 | 48 | 2 | 4x4 | 0.03 | 2.1 |\n| head | 1 | 1x1 | full |  | 128 |  | 10 classes | 0.01 | 7.6 |\n\ntimm: `uir_r1_a3_k0_s1_e1_c16_gs1` `uir_r1_a3_k0_s2_e1_c24_gs1` `uir_r1_a3_k0_s2_e1_c48_gs1`"');
INSERT INTO "study_system_attributes" VALUES(5,1,'dashboard:1:note_ver','1');
INSERT INTO "study_system_attributes" VALUES(6,1,'dashboard:2:note_str:0','"`hard_swish stem 24 | 2x24 k5 g8 e3 | 2x48/2 k5 g8 e4 | 2x96/2 k5 g16 e4 | head 384`\n\n**complete**  \naccuracy 73.50% after 200 steps  \nlatency 0.8786 ms (p20 to p80: 0.5995 to 1.314; 95 % interval of the median 12.3% wide), measured in turns with the rest of the front; ended by the time cap\n\n| stage | blocks | kernel | group width | expansion | width | stride | output | MMACs | params k |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n| stem | 1 | 3x3 | full |  | 24 | 2 | 16x16 | 0.17 | 0.7 |\n| 1 | 2 | 5x5 | 8 | 3 | 24 | 1 | 16x16 | 4.23 | 17.0 |\n| 2 | 2 | 5x5 | 8 | 4 | 48 | 2 | 8x8 | 2.54 | 40.7 |\n| 3 | 2 | 5x5 | 16 | 4 | 96 | 2 | 4x4 | 2.54 | 160.8 |\n| head | 1 | 1x1 | full |  | 384 |  | 10 classes | 0.04 | 41.1 |\n\ntimm: `uir_r2_a5_k0_s1_e3_c24_gs8` `uir_r2_a5_k0_s2_e4_c48_gs8` `uir_r2_a5_k0_s2_e4_c96_gs16`"');
INSERT INTO "study_system_attributes" VALUES(7,1,'dashboard:2:note_ver','1');
INSERT INTO "study_system_attributes" VALUES(8,1,'dashboard:4:note_str:0','"`relu stem 16 | 2x32 k5 g16 e3 | 1x64/2 k3 g32 e2 | 3x64/2 k5 g32 e4 | head 128`\n\n**complete**  \naccuracy 67.70% after 200 steps  \nlatency 0.892 ms (p20 to p80: 0.6363 to 1.175; 95 % interval of the median 9.8% wide); ended by the time cap\n\n| stage | blocks | kernel | group width | expansion | width | stride | output | MMACs | params k |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n| stem | 1 | 3x3 | full |  | 16 | 2 | 16x16 | 0.11 | 0.5 |\n| 1 | 2 | 5x5 | 16 | 3 | 32 | 1 | 16x16 | 7.08 | 28.2 |\n| 2 | 1 | 3x3 | 32 | 2 | 64 | 2 | 8x8 | 0.98 | 15.7 |\n| 3 | 3 | 5x5 | 32 | 4 | 64 | 2 | 4x4 | 4.03 | 254.2 |\n| head | 1 | 1x1 | full |  | 128 |  | 10 classes | 0.01 | 9.6 |\n\ntimm: `uir_r2_a5_k0_s1_e3_c32_gs16` `uir_r1_a3_k0_s2_e2_c64_gs32` `uir_r3_a5_k0_s2_e4_c64_gs32`"');
INSERT INTO "study_system_attributes" VALUES(9,1,'dashboard:4:note_ver','1');
INSERT INTO "study_system_attributes" VALUES(10,1,'dashboard:5:note_str:0','"`gelu stem 16 | 2x32 k3 g8 e2 | 1x56/2 k7 g8 e4 | 2x96/2 k3 g8 e3 | head 384`\n\n**complete**  \naccuracy 70.93% after 200 steps  \nlatency 0.709 ms (p20 to p80: 0.4976 to 1.015; 95 % interval of the median 3.8% wide), measured in turns with the rest of the front\n\n| stage | blocks | kernel | group width | expansion | width | stride | output | MMACs | params k |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n| stem | 1 | 3x3 | full |  | 16 | 2 | 16x16 | 0.11 | 0.5 |\n| 1 | 2 | 3x3 | 8 | 2 | 32 | 1 | 16x16 | 2.33 | 9.5 |\n| 2 | 1 | 7x7 | 8 | 4 | 56 | 2 | 8x8 | 1.52 | 24.2 |\n| 3 | 2 | 3x3 | 8 | 3 | 96 | 2 | 4x4 | 1.47 | 93.4 |\n| head | 1 | 1x1 | full |  | 384 |  | 10 classes | 0.04 | 41.1 |\n\ntimm: `uir_r2_a3_k0_s1_e2_c32_gs8` `uir_r1_a7_k0_s2_e4_c56_gs8` `uir_r2_a3_k0_s2_e3_c96_gs8`"');
INSERT INTO "study_system_attributes" VALUES(11,1,'dashboard:5:note_ver','1');
INSERT INTO "study_system_attributes" VALUES(12,1,'dashboard:artifacts:1:3672c5ebd3386d8ba89a5ebd3779fc05','"{\"artifact_id\": \"3672c5ebd3386d8ba89a5ebd3779fc05\", \"filename\": \"t0000_config.json\", \"mimetype\": \"application/json\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(13,1,'dashboard:artifacts:1:d1e3b06e7eab1cc83b34de2694342bc8','"{\"artifact_id\": \"d1e3b06e7eab1cc83b34de2694342bc8\", \"filename\": \"t0000_learning_curve.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(14,1,'dashboard:artifacts:1:1ded022080ecb6aaf05c6a5eb283ef47','"{\"artifact_id\": \"1ded022080ecb6aaf05c6a5eb283ef47\", \"filename\": \"t0000_efficiency_gap.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(15,1,'dashboard:artifacts:5:3afa80fc2c464d426d290e60b43c4aee','"{\"artifact_id\": \"3afa80fc2c464d426d290e60b43c4aee\", \"filename\": \"t0004_config.json\", \"mimetype\": \"application/json\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(16,1,'dashboard:artifacts:5:bb88500c22721a930ce6224c108cb926','"{\"artifact_id\": \"bb88500c22721a930ce6224c108cb926\", \"filename\": \"t0004_learning_curve.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(17,1,'dashboard:artifacts:5:d89281647a313ee82d71adaad9b24ad9','"{\"artifact_id\": \"d89281647a313ee82d71adaad9b24ad9\", \"filename\": \"t0004_efficiency_gap.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(18,1,'dashboard:artifacts:2:ca947959b0114cf49d6475ebf19af45c','"{\"artifact_id\": \"ca947959b0114cf49d6475ebf19af45c\", \"filename\": \"t0001_config.json\", \"mimetype\": \"application/json\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(19,1,'dashboard:artifacts:2:319971c08e08cd417aa54a19cd3aa524','"{\"artifact_id\": \"319971c08e08cd417aa54a19cd3aa524\", \"filename\": \"t0001_learning_curve.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(20,1,'dashboard:artifacts:2:d6bc93e7682f0c5e558442fc1b24d146','"{\"artifact_id\": \"d6bc93e7682f0c5e558442fc1b24d146\", \"filename\": \"t0001_efficiency_gap.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'activation',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["silu", "relu", "hard_swish", "gelu"]}}');
INSERT INTO "trial_params" VALUES(2,1,'stem_width',16.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(3,1,'stage1_width',16.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(4,1,'stage1_kernel_size',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(5,1,'stage1_group_width',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16]}}');
INSERT INTO "trial_params" VALUES(6,1,'stage1_expansion',1.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 4.0, "log": false}}');
INSERT INTO "trial_params" VALUES(7,1,'stage1_blocks',1.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 2}}');
INSERT INTO "trial_params" VALUES(8,1,'stage2_width',24.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 24, "high": 64}}');
INSERT INTO "trial_params" VALUES(9,1,'stage2_kernel_size',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(10,1,'stage2_group_width',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(11,1,'stage2_expansion',1.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(12,1,'stage2_blocks',1.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(13,1,'stage3_width',48.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 16, "low": 48, "high": 128}}');
INSERT INTO "trial_params" VALUES(14,1,'stage3_kernel_size',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(15,1,'stage3_group_width',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(16,1,'stage3_expansion',1.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(17,1,'stage3_blocks',1.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(18,1,'head_width',128.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 128, "low": 128, "high": 512}}');
INSERT INTO "trial_params" VALUES(19,2,'activation',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["silu", "relu", "hard_swish", "gelu"]}}');
INSERT INTO "trial_params" VALUES(20,2,'stem_width',24.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(21,2,'stage1_width',24.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(22,2,'stage1_kernel_size',5.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(23,2,'stage1_group_width',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16]}}');
INSERT INTO "trial_params" VALUES(24,2,'stage1_expansion',3.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 4.0, "log": false}}');
INSERT INTO "trial_params" VALUES(25,2,'stage1_blocks',2.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 2}}');
INSERT INTO "trial_params" VALUES(26,2,'stage2_width',48.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 24, "high": 64}}');
INSERT INTO "trial_params" VALUES(27,2,'stage2_kernel_size',5.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(28,2,'stage2_group_width',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(29,2,'stage2_expansion',4.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(30,2,'stage2_blocks',2.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(31,2,'stage3_width',96.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 16, "low": 48, "high": 128}}');
INSERT INTO "trial_params" VALUES(32,2,'stage3_kernel_size',5.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(33,2,'stage3_group_width',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(34,2,'stage3_expansion',4.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(35,2,'stage3_blocks',2.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(36,2,'head_width',384.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 128, "low": 128, "high": 512}}');
INSERT INTO "trial_params" VALUES(37,3,'activation',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["silu", "relu", "hard_swish", "gelu"]}}');
INSERT INTO "trial_params" VALUES(38,3,'stem_width',32.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(39,3,'stage1_width',16.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(40,3,'stage1_kernel_size',7.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(41,3,'stage1_group_width',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16]}}');
INSERT INTO "trial_params" VALUES(42,3,'stage1_expansion',4.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 4.0, "log": false}}');
INSERT INTO "trial_params" VALUES(43,3,'stage1_blocks',2.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 2}}');
INSERT INTO "trial_params" VALUES(44,3,'stage2_width',40.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 24, "high": 64}}');
INSERT INTO "trial_params" VALUES(45,3,'stage2_kernel_size',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(46,3,'stage2_group_width',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(47,3,'stage2_expansion',6.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(48,3,'stage2_blocks',1.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(49,3,'stage3_width',128.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 16, "low": 48, "high": 128}}');
INSERT INTO "trial_params" VALUES(50,3,'stage3_kernel_size',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(51,3,'stage3_group_width',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(52,3,'stage3_expansion',2.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(53,3,'stage3_blocks',2.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(54,3,'head_width',512.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 128, "low": 128, "high": 512}}');
INSERT INTO "trial_params" VALUES(55,4,'activation',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["silu", "relu", "hard_swish", "gelu"]}}');
INSERT INTO "trial_params" VALUES(56,4,'stem_width',16.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(57,4,'stage1_width',32.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(58,4,'stage1_kernel_size',5.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(59,4,'stage1_group_width',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16]}}');
INSERT INTO "trial_params" VALUES(60,4,'stage1_expansion',3.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 4.0, "log": false}}');
INSERT INTO "trial_params" VALUES(61,4,'stage1_blocks',2.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 2}}');
INSERT INTO "trial_params" VALUES(62,4,'stage2_width',64.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 24, "high": 64}}');
INSERT INTO "trial_params" VALUES(63,4,'stage2_kernel_size',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(64,4,'stage2_group_width',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(65,4,'stage2_expansion',2.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(66,4,'stage2_blocks',1.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(67,4,'stage3_width',64.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 16, "low": 48, "high": 128}}');
INSERT INTO "trial_params" VALUES(68,4,'stage3_kernel_size',5.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(69,4,'stage3_group_width',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(70,4,'stage3_expansion',4.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(71,4,'stage3_blocks',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(72,4,'head_width',128.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 128, "low": 128, "high": 512}}');
INSERT INTO "trial_params" VALUES(73,5,'activation',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["silu", "relu", "hard_swish", "gelu"]}}');
INSERT INTO "trial_params" VALUES(74,5,'stem_width',16.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(75,5,'stage1_width',32.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 16, "high": 32}}');
INSERT INTO "trial_params" VALUES(76,5,'stage1_kernel_size',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(77,5,'stage1_group_width',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16]}}');
INSERT INTO "trial_params" VALUES(78,5,'stage1_expansion',2.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 4.0, "log": false}}');
INSERT INTO "trial_params" VALUES(79,5,'stage1_blocks',2.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 2}}');
INSERT INTO "trial_params" VALUES(80,5,'stage2_width',56.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 8, "low": 24, "high": 64}}');
INSERT INTO "trial_params" VALUES(81,5,'stage2_kernel_size',7.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(82,5,'stage2_group_width',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(83,5,'stage2_expansion',4.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(84,5,'stage2_blocks',1.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(85,5,'stage3_width',96.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 16, "low": 48, "high": 128}}');
INSERT INTO "trial_params" VALUES(86,5,'stage3_kernel_size',3.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 2, "low": 3, "high": 7}}');
INSERT INTO "trial_params" VALUES(87,5,'stage3_group_width',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(88,5,'stage3_expansion',3.0,'{"name": "FloatDistribution", "attributes": {"step": 1.0, "low": 1.0, "high": 6.0, "log": false}}');
INSERT INTO "trial_params" VALUES(89,5,'stage3_blocks',2.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 1, "high": 3}}');
INSERT INTO "trial_params" VALUES(90,5,'head_width',384.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 128, "low": 128, "high": 512}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'arch','"silu stem 16 | 1x16 k3 g1 e1 | 1x24/2 k3 g1 e1 | 1x48/2 k3 g1 e1 | head 128"');
INSERT INTO "trial_user_attributes" VALUES(2,1,'arch_id','"8f3f122471c3"');
INSERT INTO "trial_user_attributes" VALUES(3,1,'device','"AMD EPYC"');
INSERT INTO "trial_user_attributes" VALUES(4,1,'engine','"torchscript"');
INSERT INTO "trial_user_attributes" VALUES(5,1,'params','11810');
INSERT INTO "trial_user_attributes" VALUES(6,1,'macs','367232');
INSERT INTO "trial_user_attributes" VALUES(7,1,'latency_p20_p80_ms','"0.1576 to 0.5094"');
INSERT INTO "trial_user_attributes" VALUES(8,1,'memory_mb','0.096');
INSERT INTO "trial_user_attributes" VALUES(9,1,'computational_efficiency','0.0404');
INSERT INTO "trial_user_attributes" VALUES(10,1,'seconds','15.16');
INSERT INTO "trial_user_attributes" VALUES(11,2,'arch','"hard_swish stem 24 | 2x24 k5 g8 e3 | 2x48/2 k5 g8 e4 | 2x96/2 k5 g16 e4 | head 384"');
INSERT INTO "trial_user_attributes" VALUES(12,2,'arch_id','"85ac66428731"');
INSERT INTO "trial_user_attributes" VALUES(13,2,'device','"AMD EPYC"');
INSERT INTO "trial_user_attributes" VALUES(14,2,'engine','"torchscript"');
INSERT INTO "trial_user_attributes" VALUES(15,2,'params','260242');
INSERT INTO "trial_user_attributes" VALUES(16,2,'macs','9520896');
INSERT INTO "trial_user_attributes" VALUES(17,2,'latency_p20_p80_ms','"0.615 to 1.128"');
INSERT INTO "trial_user_attributes" VALUES(18,2,'memory_mb','1.2');
INSERT INTO "trial_user_attributes" VALUES(19,2,'computational_efficiency','0.3544');
INSERT INTO "trial_user_attributes" VALUES(20,2,'latency_doubtful','"ended by the time cap"');
INSERT INTO "trial_user_attributes" VALUES(21,2,'seconds','155.9');
INSERT INTO "trial_user_attributes" VALUES(22,3,'arch','"hard_swish stem 32 | 2x16 k7 g16 e4 | 1x40/2 k3 g1 e6 | 2x128/2 k3 g8 e2 | head 512"');
INSERT INTO "trial_user_attributes" VALUES(23,3,'arch_id','"037ce639d7ee"');
INSERT INTO "trial_user_attributes" VALUES(24,3,'device','"AMD EPYC"');
INSERT INTO "trial_user_attributes" VALUES(25,3,'engine','"torchscript"');
INSERT INTO "trial_user_attributes" VALUES(26,3,'reason','"interrupted"');
INSERT INTO "trial_user_attributes" VALUES(27,4,'arch','"relu stem 16 | 2x32 k5 g16 e3 | 1x64/2 k3 g32 e2 | 3x64/2 k5 g32 e4 | head 128"');
INSERT INTO "trial_user_attributes" VALUES(28,4,'arch_id','"6ddb9cfb25a7"');
INSERT INTO "trial_user_attributes" VALUES(29,4,'device','"AMD EPYC"');
INSERT INTO "trial_user_attributes" VALUES(30,4,'engine','"torchscript"');
INSERT INTO "trial_user_attributes" VALUES(31,4,'params','308122');
INSERT INTO "trial_user_attributes" VALUES(32,4,'macs','12211456');
INSERT INTO "trial_user_attributes" VALUES(33,4,'latency_p20_p80_ms','"0.6363 to 1.175"');
INSERT INTO "trial_user_attributes" VALUES(34,4,'memory_mb','1.46');
INSERT INTO "trial_user_attributes" VALUES(35,4,'computational_efficiency','0.4279');
INSERT INTO "trial_user_attributes" VALUES(36,4,'latency_doubtful','"ended by the time cap"');
INSERT INTO "trial_user_attributes" VALUES(37,4,'seconds','155.88');
INSERT INTO "trial_user_attributes" VALUES(38,5,'arch','"gelu stem 16 | 2x32 k3 g8 e2 | 1x56/2 k7 g8 e4 | 2x96/2 k3 g8 e3 | head 384"');
INSERT INTO "trial_user_attributes" VALUES(39,5,'arch_id','"834d40067b5d"');
INSERT INTO "trial_user_attributes" VALUES(40,5,'device','"AMD EPYC"');
INSERT INTO "trial_user_attributes" VALUES(41,5,'engine','"torchscript"');
INSERT INTO "trial_user_attributes" VALUES(42,5,'params','168682');
INSERT INTO "trial_user_attributes" VALUES(43,5,'macs','5469952');
INSERT INTO "trial_user_attributes" VALUES(44,5,'latency_p20_p80_ms','"0.5378 to 0.8132"');
INSERT INTO "trial_user_attributes" VALUES(45,5,'memory_mb','0.834');
INSERT INTO "trial_user_attributes" VALUES(46,5,'computational_efficiency','0.2234');
INSERT INTO "trial_user_attributes" VALUES(47,5,'latency_doubtful','"ended by the time cap"');
INSERT INTO "trial_user_attributes" VALUES(48,5,'seconds','82.31');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,3.65666666666666639873e-01,'FINITE');
INSERT INTO "trial_values" VALUES(2,1,1,2.84268397648780757336e-01,'FINITE');
INSERT INTO "trial_values" VALUES(3,2,0,0.735,'FINITE');
INSERT INTO "trial_values" VALUES(4,2,1,8.39717471402968596017e-01,'FINITE');
INSERT INTO "trial_values" VALUES(5,4,0,0.677,'FINITE');
INSERT INTO "trial_values" VALUES(6,4,1,8.91957791539917943524e-01,'FINITE');
INSERT INTO "trial_values" VALUES(7,5,0,7.09333333333333371228e-01,'FINITE');
INSERT INTO "trial_values" VALUES(8,5,1,7.65367833203651426465e-01,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-29 13:21:02.374914','2026-11-29 13:21:17.606150');
INSERT INTO "trials" VALUES(2,1,1,'COMPLETE','2026-11-29 13:21:17.615308','2026-11-29 13:23:53.561669');
INSERT INTO "trials" VALUES(3,2,1,'FAIL','2026-11-29 13:23:53.567137','2026-11-29 13:25:15.031217');
INSERT INTO "trials" VALUES(4,3,1,'COMPLETE','2026-11-29 13:26:38.946297','2026-11-29 13:29:16.667148');
INSERT INTO "trials" VALUES(5,4,1,'COMPLETE','2026-11-29 13:29:16.676679','2026-11-29 13:30:39.063292');
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
CREATE UNIQUE INDEX convfirst_candidates_once ON convfirst_candidates (study_id, arch_id) WHERE state = 'complete';
CREATE TRIGGER convfirst_trial_deleted AFTER DELETE ON trials BEGIN
    DELETE FROM convfirst_learning_curves WHERE trial_id = OLD.trial_id;
    DELETE FROM convfirst_latencies WHERE trial_id = OLD.trial_id;
    DELETE FROM convfirst_candidates WHERE trial_id = OLD.trial_id;
END;
CREATE TRIGGER convfirst_study_deleted AFTER DELETE ON studies BEGIN
    DELETE FROM convfirst_studies WHERE study_id = OLD.study_id;
END;
CREATE VIEW convfirst_evaluations AS
SELECT s.study_name, c.study_id, c.trial_id, c.number, c.state, c.reason, c.arch_id, c.summary, c.arch,
       c.params, c.macs, c.accuracy, c.loss, c.seed, c.train_seconds, c.train_memory_bytes, c.latency_seconds,
       c.total_seconds, c.finished_at,
       l.median_ms AS latency_ms, l.p20_ms AS latency_p20_ms, l.p80_ms AS latency_p80_ms, l.repeats AS latency_repeats,
       l.raw_median_ms AS latency_raw_ms, l.anchor_median_ms, l.weight_bytes, l.workspace_bytes,
       l.engine, l.dtype, l.batch_size, l.resolution, l.threads, l.device_id,
       d.kind AS device_kind, d.name AS device_name, o.config,
       l.stage AS latency_stage, l.interval_share AS latency_interval_share, l.capped AS latency_capped,
       l.throttled AS latency_throttled, l.sm_clock_mhz, l.temperature_c, l.over_limit AS latency_over_limit,
       b.median_ms AS searched_latency_ms,
       c.macs * l.batch_size / NULLIF(l.median_ms / 1000 * p.macs_per_s, 0) AS computational_efficiency
FROM convfirst_candidates c
JOIN studies s ON s.study_id = c.study_id
JOIN convfirst_studies o ON o.study_id = c.study_id
LEFT JOIN convfirst_latencies l ON l.trial_id = c.trial_id AND NOT EXISTS (
    SELECT 1 FROM convfirst_latencies f
    WHERE f.trial_id = l.trial_id AND f.device_id = l.device_id AND f.engine = l.engine AND f.dtype = l.dtype
      AND f.batch_size = l.batch_size AND f.resolution = l.resolution AND f.threads = l.threads
      AND f.stage = 'final' AND l.stage = 'search'
)
LEFT JOIN convfirst_latencies b
    ON b.trial_id = l.trial_id AND b.device_id = l.device_id AND b.engine = l.engine AND b.dtype = l.dtype
    AND b.batch_size = l.batch_size AND b.resolution = l.resolution AND b.threads = l.threads AND b.stage = 'search'
LEFT JOIN convfirst_devices d ON d.device_id = l.device_id
LEFT JOIN convfirst_profiles p ON p.device_id = l.device_id AND p.dtype = l.dtype AND p.threads = l.threads;
CREATE VIEW pareto_front AS
SELECT study_name, device_name, engine, dtype, batch_size, resolution, threads,
       number, accuracy, latency_ms, latency_p20_ms, latency_p80_ms, params, macs, weight_bytes, workspace_bytes,
       arch_id, summary, arch, study_id, trial_id, device_id, device_kind,
       computational_efficiency, latency_stage, latency_interval_share, latency_capped, searched_latency_ms
FROM (
    SELECT e.*,
           MAX(accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads
               ORDER BY latency_ms GROUPS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ) AS best_of_faster,
           MAX(accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads, latency_ms
           ) AS best_of_equally_fast
    FROM convfirst_evaluations e
    WHERE state = 'complete' AND latency_ms IS NOT NULL AND NOT latency_over_limit
) ranked
WHERE accuracy = best_of_equally_fast AND (best_of_faster IS NULL OR accuracy > best_of_faster);
CREATE TRIGGER convfirst_baselines_deleted AFTER DELETE ON studies BEGIN
    DELETE FROM convfirst_baseline_trainings WHERE study_id = OLD.study_id;
    DELETE FROM convfirst_baseline_latencies WHERE study_id = OLD.study_id;
END;
CREATE VIEW convfirst_retrained AS
SELECT e.*,
       r.data AS retrained_data, r.data_fingerprint AS retrained_fingerprint, r.resolution AS retrained_resolution,
       r.steps AS retrained_steps, r.batch_size AS retrained_batch_size, r.learning_rate AS retrained_learning_rate,
       r.seed AS retrained_seed, r.accuracy AS retrained_accuracy, r.loss AS retrained_loss,
       r.train_seconds AS retrained_seconds
FROM convfirst_evaluations e
JOIN convfirst_retrainings r ON r.trial_id = e.trial_id AND r.accuracy IS NOT NULL;
CREATE VIEW retrained_front AS
SELECT *
FROM (
    SELECT e.*,
           MAX(retrained_accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads,
                   retrained_fingerprint, retrained_resolution, retrained_steps, retrained_batch_size,
                   retrained_learning_rate, retrained_seed
               ORDER BY latency_ms GROUPS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
           ) AS best_of_faster,
           MAX(retrained_accuracy) OVER (
               PARTITION BY study_id, device_id, engine, dtype, batch_size, resolution, threads,
                   retrained_fingerprint, retrained_resolution, retrained_steps, retrained_batch_size,
                   retrained_learning_rate, retrained_seed, latency_ms
           ) AS best_of_equally_fast
    FROM convfirst_retrained e
    WHERE latency_ms IS NOT NULL AND NOT latency_over_limit
) ranked
WHERE retrained_accuracy = best_of_equally_fast AND (best_of_faster IS NULL OR retrained_accuracy > best_of_faster);
CREATE TRIGGER convfirst_candidate_deleted AFTER DELETE ON convfirst_candidates BEGIN
    DELETE FROM convfirst_retrainings WHERE trial_id = OLD.trial_id;
END;
COMMIT;

BEGIN TRANSACTION;
CREATE TABLE application_versions (
    version_id TEXT NOT NULL PRIMARY KEY,
    version_name TEXT NOT NULL UNIQUE,
    version_timestamp INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    created_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000)
, "application_name" TEXT DEFAULT NULL);
INSERT INTO "application_versions" VALUES('d2a13a52-e1f0-482c-b412-d8dfdf137784','jobs-1/mini',1796045766000,1796045766000,'vstar-engine');
CREATE TABLE dbos_migrations (version INTEGER NOT NULL PRIMARY KEY);
INSERT INTO "dbos_migrations" VALUES(125);
CREATE TABLE notifications (
    message_uuid TEXT NOT NULL DEFAULT (hex(randomblob(16))) PRIMARY KEY,
    destination_uuid TEXT NOT NULL,
    topic TEXT,
    message TEXT NOT NULL,
    created_at_epoch_ms INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000), "serialization" TEXT DEFAULT NULL, "consumed" BOOLEAN NOT NULL DEFAULT FALSE, consumed_by_function_id INTEGER,
    FOREIGN KEY (destination_uuid) REFERENCES workflow_status(workflow_uuid) 
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE TABLE "operation_outputs" (
    workflow_uuid TEXT NOT NULL,
    function_id INTEGER NOT NULL,
    function_name TEXT NOT NULL DEFAULT '',
    output TEXT,
    error TEXT,
    child_workflow_id TEXT,
    started_at_epoch_ms INTEGER,
    completed_at_epoch_ms INTEGER,
    serialization TEXT,
    application_name TEXT DEFAULT NULL,
    retention_timestamp INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    PRIMARY KEY (workflow_uuid, function_id)
);
INSERT INTO "operation_outputs" VALUES('video_845cd95b980749be99a4c9bb7ff7b433',1,'make','{"status":"completed","at":1796045782.3981102,"file":"video_845cd95b980749be99a4c9bb7ff7b433.mp4","bytes":3673,"sha256":"8834106bd1e4c7733b2cf6178f52e2be4392263c004d3740006b6e58ddd41122","frames":4,"width":64,"height":32,"seconds":{"text":0.0232,"denoise":0.1693,"decode":0.044,"encode":0.0424}}',NULL,NULL,1796045779911,1796045782398,'portable_json','vstar-engine',1796045782000);
INSERT INTO "operation_outputs" VALUES('video_9da9cea577c3477d8579f6e80c7af687',1,'make','{"status":"completed","at":1796045783.1653779,"file":"video_9da9cea577c3477d8579f6e80c7af687.mp4","bytes":3195,"sha256":"f6745c0d069b8622d9869c9c7dca519e4d149f3fc7249b275f1d9722903274ce","frames":4,"width":64,"height":32,"seconds":{"text":0.009,"denoise":0.3204,"decode":0.0926,"encode":0.088}}',NULL,NULL,1796045782442,1796045783166,'portable_json','vstar-engine',1796045783000);
CREATE TABLE queues (
    queue_id TEXT PRIMARY KEY DEFAULT (hex(randomblob(16))),
    name TEXT NOT NULL UNIQUE,
    concurrency INTEGER,
    worker_concurrency INTEGER,
    rate_limit_max INTEGER,
    rate_limit_period_sec REAL,
    priority_enabled BOOLEAN NOT NULL DEFAULT FALSE,
    partition_queue BOOLEAN NOT NULL DEFAULT FALSE,
    polling_interval_sec REAL NOT NULL DEFAULT 1.0,
    created_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    updated_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000)
, "application_name" TEXT DEFAULT NULL, "partition_concurrency" INTEGER DEFAULT NULL, "partition_worker_concurrency" INTEGER DEFAULT NULL, "partition_rate_limit_max" INTEGER DEFAULT NULL, "partition_rate_limit_period_sec" REAL DEFAULT NULL);
INSERT INTO "queues" VALUES('371F51251C753DD1486473D22E938D63','videos',NULL,2,NULL,NULL,1,0,0.05,1796045767000,1796045766998,'vstar-engine',NULL,NULL,NULL,NULL);
CREATE TABLE streams (
    workflow_uuid TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    "offset" INTEGER NOT NULL, function_id INTEGER NOT NULL DEFAULT 0, "serialization" TEXT DEFAULT NULL,
    PRIMARY KEY (workflow_uuid, key, "offset"),
    FOREIGN KEY (workflow_uuid) REFERENCES workflow_status(workflow_uuid) 
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE TABLE workflow_events (
    workflow_uuid TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL, "serialization" TEXT DEFAULT NULL,
    PRIMARY KEY (workflow_uuid, key),
    FOREIGN KEY (workflow_uuid) REFERENCES workflow_status(workflow_uuid) 
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE TABLE workflow_events_history (
    workflow_uuid TEXT NOT NULL,
    function_id INTEGER NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL, "serialization" TEXT DEFAULT NULL,
    PRIMARY KEY (workflow_uuid, function_id, key),
    FOREIGN KEY (workflow_uuid) REFERENCES workflow_status(workflow_uuid)
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE TABLE workflow_input (
    workflow_uuid TEXT NOT NULL PRIMARY KEY,
    inputs TEXT,
    retention_timestamp INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000)
);
INSERT INTO "workflow_input" VALUES('video_845cd95b980749be99a4c9bb7ff7b433','{"namedArgs":{},"positionalArgs":[{"id":"video_845cd95b980749be99a4c9bb7ff7b433","key_id":"local","model":"mini","prompt":"finished","states":["a red ball on the left","a red ball on the right"],"frames":4,"size":[32,64],"created_at":1796045779.8799932,"seed":1,"fps":8.0,"steps":2,"guidance":12.0,"eta":1.0,"tar":{"sigma":{"0":1.0,"1":8.0},"strength":1.0,"until_step":13},"negative":"","negatives":["","a blue ball"],"at":[0,1.0],"durations":[],"mode":"linear","embeddings":null,"priority":0,"metadata":{"take":"one"},"synopsis_source":"given","remixed_from":null,"fingerprint":"ba82067ae531102bbe115d541dcbf9485ce142b4c860090b31f64b39dd97e1cc","fast":[]}]}',1796045779000);
INSERT INTO "workflow_input" VALUES('video_6051a1f159df46afa4cbc06a808c90af','{"namedArgs":{},"positionalArgs":[{"id":"video_6051a1f159df46afa4cbc06a808c90af","key_id":"local","model":"mini","prompt":"running","states":["running"],"frames":4,"size":[32,64],"created_at":1796045782.4113085,"seed":2,"fps":8.0,"steps":25,"guidance":12.0,"eta":1.0,"tar":{"sigma":{"0":1.0,"1":8.0},"strength":1.0,"until_step":13},"negative":"","negatives":[],"at":[],"durations":[],"mode":"linear","embeddings":null,"priority":0,"metadata":{},"synopsis_source":"prompt","remixed_from":null,"fingerprint":"3b2aade56dedd515ed84bf1871ea4bb9a8588da10cae82ff4a14ca491e04a100","fast":[]}]}',1796045782000);
INSERT INTO "workflow_input" VALUES('video_9da9cea577c3477d8579f6e80c7af687','{"namedArgs":{},"positionalArgs":[{"id":"video_9da9cea577c3477d8579f6e80c7af687","key_id":"local","model":"mini","prompt":"taken up","states":["taken up"],"frames":4,"size":[32,64],"created_at":1796045782.4352808,"seed":3,"fps":8.0,"steps":2,"guidance":12.0,"eta":1.0,"tar":{"sigma":{"0":1.0,"1":8.0},"strength":1.0,"until_step":13},"negative":"","negatives":[],"at":[],"durations":[],"mode":"linear","embeddings":null,"priority":0,"metadata":{},"synopsis_source":"prompt","remixed_from":null,"fingerprint":"4297a8fbf86cd4764f3c589d57aabf80c66b4cdfcc8bf091e7730f6a10e1ab62","fast":[]}]}',1796045782000);
INSERT INTO "workflow_input" VALUES('video_77293260436b43e5ac02efa066dbe737','{"namedArgs":{},"positionalArgs":[{"id":"video_77293260436b43e5ac02efa066dbe737","key_id":"local","model":"mini","prompt":"taken up","states":["taken up"],"frames":4,"size":[32,64],"created_at":1796045782.4505732,"seed":4,"fps":8.0,"steps":2,"guidance":12.0,"eta":1.0,"tar":{"sigma":{"0":1.0,"1":8.0},"strength":1.0,"until_step":13},"negative":"","negatives":[],"at":[],"durations":[],"mode":"linear","embeddings":null,"priority":0,"metadata":{},"synopsis_source":"prompt","remixed_from":null,"fingerprint":"7978473ae301112fe66626259647890c962856b9cbc1455f1266c78cd4be21c9","fast":[]}]}',1796045782000);
INSERT INTO "workflow_input" VALUES('video_cb76f84a455d4cb68373c5b4bb77fe9d','{"namedArgs":{},"positionalArgs":[{"id":"video_cb76f84a455d4cb68373c5b4bb77fe9d","key_id":"local","model":"mini","prompt":"taken up","states":["taken up"],"frames":4,"size":[32,64],"created_at":1796045782.4949286,"seed":5,"fps":8.0,"steps":2,"guidance":12.0,"eta":1.0,"tar":{"sigma":{"0":1.0,"1":8.0},"strength":1.0,"until_step":13},"negative":"","negatives":[],"at":[],"durations":[],"mode":"linear","embeddings":null,"priority":0,"metadata":{},"synopsis_source":"prompt","remixed_from":null,"fingerprint":"ef0d49c8f1cb3ce34eedb1dcc2bab9139420b42249a097405d9e2e208707ef5c","fast":[]}]}',1796045782000);
INSERT INTO "workflow_input" VALUES('video_101f91c6ed1244ce95b2268bf963147b','{"namedArgs":{},"positionalArgs":[{"id":"video_101f91c6ed1244ce95b2268bf963147b","key_id":"local","model":"mini","prompt":"waiting","states":["a red ball on the left","a red ball on the right"],"frames":4,"size":[32,64],"created_at":1796045782.5403917,"seed":6,"fps":8.0,"steps":2,"guidance":12.0,"eta":1.0,"tar":{"sigma":{"0":1.0,"1":8.0},"strength":1.0,"until_step":13},"negative":"","negatives":["","a blue ball"],"at":[0,1.0],"durations":[],"mode":"linear","embeddings":null,"priority":0,"metadata":{"take":"one"},"synopsis_source":"given","remixed_from":null,"fingerprint":"a5c4ff12ab6d782deb48d6825ae75832ace5ccec5c95ffcff708d2d23f4a0a79","fast":[]}]}',1796045782000);
INSERT INTO "workflow_input" VALUES('video_71b7d2b62a9e4c73a3192a1dc6451e3a','{"namedArgs":{},"positionalArgs":[{"id":"video_71b7d2b62a9e4c73a3192a1dc6451e3a","key_id":"local","model":"mini","prompt":"cancelled","states":["cancelled"],"frames":4,"size":[32,64],"created_at":1796045782.5465665,"seed":7,"fps":8.0,"steps":2,"guidance":12.0,"eta":1.0,"tar":{"sigma":{"0":1.0,"1":8.0},"strength":1.0,"until_step":13},"negative":"","negatives":[],"at":[],"durations":[],"mode":"linear","embeddings":null,"priority":0,"metadata":{},"synopsis_source":"prompt","remixed_from":null,"fingerprint":"5c277ed5076d52b1ec5fc3fae2fc9310209df415e1008c323a385b9d7d06e625","fast":[]}]}',1796045782000);
CREATE TABLE workflow_output (
    workflow_uuid TEXT NOT NULL PRIMARY KEY,
    output TEXT,
    error TEXT,
    retention_timestamp INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000)
);
INSERT INTO "workflow_output" VALUES('video_845cd95b980749be99a4c9bb7ff7b433','{"status":"completed","at":1796045782.3981102,"file":"video_845cd95b980749be99a4c9bb7ff7b433.mp4","bytes":3673,"sha256":"8834106bd1e4c7733b2cf6178f52e2be4392263c004d3740006b6e58ddd41122","frames":4,"width":64,"height":32,"seconds":{"text":0.0232,"denoise":0.1693,"decode":0.044,"encode":0.0424}}',NULL,1796045782000);
INSERT INTO "workflow_output" VALUES('video_9da9cea577c3477d8579f6e80c7af687','{"status":"completed","at":1796045783.1653779,"file":"video_9da9cea577c3477d8579f6e80c7af687.mp4","bytes":3195,"sha256":"f6745c0d069b8622d9869c9c7dca519e4d149f3fc7249b275f1d9722903274ce","frames":4,"width":64,"height":32,"seconds":{"text":0.009,"denoise":0.3204,"decode":0.0926,"encode":0.088}}',NULL,1796045783000);
CREATE TABLE workflow_schedules (
    schedule_id TEXT PRIMARY KEY,
    schedule_name TEXT NOT NULL UNIQUE,
    workflow_name TEXT NOT NULL,
    workflow_class_name TEXT,
    schedule TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'ACTIVE',
    context TEXT NOT NULL
, "last_fired_at" TEXT DEFAULT NULL, "automatic_backfill" BOOLEAN NOT NULL DEFAULT FALSE, "cron_timezone" TEXT DEFAULT NULL, "queue_name" TEXT DEFAULT NULL, "application_name" TEXT DEFAULT NULL);
CREATE TABLE workflow_status (
    workflow_uuid TEXT PRIMARY KEY,
    status TEXT,
    name TEXT,
    authenticated_user TEXT,
    assumed_role TEXT,
    authenticated_roles TEXT,
    request TEXT,
    output TEXT,
    error TEXT,
    executor_id TEXT,
    created_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    updated_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    application_version TEXT,
    application_id TEXT,
    class_name TEXT DEFAULT NULL,
    config_name TEXT DEFAULT NULL,
    recovery_attempts INTEGER DEFAULT 0,
    queue_name TEXT,
    workflow_timeout_ms INTEGER,
    workflow_deadline_epoch_ms INTEGER,
    inputs TEXT,
    started_at_epoch_ms INTEGER,
    deduplication_id TEXT,
    priority INTEGER NOT NULL DEFAULT 0
, queue_partition_key TEXT, forked_from TEXT, "owner_xid" TEXT DEFAULT NULL, "parent_workflow_id" TEXT DEFAULT NULL, "serialization" TEXT DEFAULT NULL, "delay_until_epoch_ms" BIGINT DEFAULT NULL, "was_forked_from" BOOLEAN NOT NULL DEFAULT FALSE, "rate_limited" BOOLEAN NOT NULL DEFAULT FALSE, "completed_at" BIGINT, "attributes" TEXT, "schedule_name" TEXT, "debounce_deadline_epoch_ms" BIGINT DEFAULT NULL, "is_debounced" BOOLEAN NOT NULL DEFAULT FALSE, "application_name" TEXT DEFAULT NULL, "creator_xid" TEXT DEFAULT NULL);
INSERT INTO "workflow_status" VALUES('video_845cd95b980749be99a4c9bb7ff7b433','SUCCESS','generate','local',NULL,NULL,NULL,NULL,NULL,'server-0',1796045779000,1796045782000,'jobs-1/mini','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,'portable_json',NULL,0,0,1796045782000,'null',NULL,NULL,0,'vstar-engine','47eead57-9b7f-4406-b042-f41b99bafc3f');
INSERT INTO "workflow_status" VALUES('video_6051a1f159df46afa4cbc06a808c90af','PENDING','generate','local',NULL,NULL,NULL,NULL,NULL,'server-0',1796045782000,1796045782000,'jobs-1/mini','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,'c2b5ff5f-f952-48ea-afee-7f3bcf695042',NULL,'portable_json',NULL,0,0,NULL,'null',NULL,NULL,0,'vstar-engine','c2b5ff5f-f952-48ea-afee-7f3bcf695042');
INSERT INTO "workflow_status" VALUES('video_9da9cea577c3477d8579f6e80c7af687','SUCCESS','generate','local',NULL,NULL,NULL,NULL,NULL,'server-0',1796045782000,1796045783000,'jobs-1/mini','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,'portable_json',NULL,0,0,1796045783000,'null',NULL,NULL,0,'vstar-engine','eaf0e447-d481-4d71-93e2-ec51d3795075');
INSERT INTO "workflow_status" VALUES('video_77293260436b43e5ac02efa066dbe737','PENDING','generate','local',NULL,NULL,NULL,NULL,NULL,'server-0',1796045782000,1796045782000,'jobs-1/mini','',NULL,NULL,1,'videos',NULL,NULL,NULL,1796045782000,NULL,1000,NULL,NULL,'2daaf970-c171-49e6-92de-6322557641cd',NULL,'portable_json',NULL,0,0,NULL,'null',NULL,NULL,0,'vstar-engine','c9762bd5-7d97-486d-bcf6-89903d2e5475');
INSERT INTO "workflow_status" VALUES('video_cb76f84a455d4cb68373c5b4bb77fe9d','PENDING','generate','local',NULL,NULL,NULL,NULL,NULL,'server-0',1796045782000,1796045782000,'jobs-1/mini','',NULL,NULL,1,'videos',NULL,NULL,NULL,1796045782000,NULL,1000,NULL,NULL,'bc22fa9a-6371-4ea5-8982-5d4f60fa4e7b',NULL,'portable_json',NULL,0,0,NULL,'null',NULL,NULL,0,'vstar-engine','02a302cb-15f2-4ad5-91f8-32f438e09964');
INSERT INTO "workflow_status" VALUES('video_101f91c6ed1244ce95b2268bf963147b','ENQUEUED','generate','local',NULL,NULL,NULL,NULL,NULL,NULL,1796045782000,1796045782000,'jobs-1/mini','',NULL,NULL,0,'videos',NULL,NULL,NULL,NULL,NULL,1000,NULL,NULL,NULL,NULL,'portable_json',NULL,0,0,NULL,'null',NULL,NULL,0,'vstar-engine','c131aadd-fb12-43e2-8df9-445b940b341d');
INSERT INTO "workflow_status" VALUES('video_71b7d2b62a9e4c73a3192a1dc6451e3a','CANCELLED','generate','local',NULL,NULL,NULL,NULL,NULL,NULL,1796045782000,1796045782000,'jobs-1/mini','',NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,1000,NULL,NULL,NULL,NULL,'portable_json',NULL,0,0,1796045782000,'null',NULL,NULL,0,'vstar-engine','d30c9128-301c-4cd4-8b62-7eec251783b7');
CREATE INDEX workflow_status_created_at_index ON workflow_status (created_at);
CREATE INDEX idx_workflow_topic ON notifications (destination_uuid, topic);
CREATE INDEX "idx_workflow_status_delayed" ON "workflow_status" ("delay_until_epoch_ms") WHERE status = 'DELAYED';
CREATE INDEX "idx_workflow_status_forked_from" ON "workflow_status" ("forked_from") WHERE "forked_from" IS NOT NULL;
CREATE INDEX "idx_workflow_status_parent_workflow_id" ON "workflow_status" ("parent_workflow_id") WHERE "parent_workflow_id" IS NOT NULL;
CREATE UNIQUE INDEX "uq_workflow_status_dedup_id" ON "workflow_status" ("queue_name", "deduplication_id") WHERE "deduplication_id" IS NOT NULL;
CREATE INDEX "idx_workflow_status_pending" ON "workflow_status" ("created_at") WHERE "status" = 'PENDING';
CREATE INDEX "idx_workflow_status_failed" ON "workflow_status" ("status", "created_at") WHERE "status" IN ('ERROR', 'CANCELLED', 'MAX_RECOVERY_ATTEMPTS_EXCEEDED');
CREATE INDEX "idx_workflow_status_rate_limited" ON "workflow_status" ("queue_name", "started_at_epoch_ms") WHERE "rate_limited" = TRUE;
CREATE INDEX "idx_workflow_status_completed_at" ON "workflow_status" ("completed_at") WHERE "completed_at" IS NOT NULL;
CREATE INDEX "idx_workflow_status_started_at" ON "workflow_status" ("started_at_epoch_ms") WHERE "started_at_epoch_ms" IS NOT NULL;
CREATE INDEX "idx_workflow_status_schedule_name" ON "workflow_status" ("schedule_name") WHERE "schedule_name" IS NOT NULL;
CREATE UNIQUE INDEX "uq_application_versions_owner_version"
    ON application_versions ("application_name", "version_name")
    WHERE "application_name" IS NOT NULL;
CREATE UNIQUE INDEX "uq_application_versions_unclaimed_version"
    ON application_versions ("version_name")
    WHERE "application_name" IS NULL;
CREATE INDEX idx_workflow_input_retention
    ON workflow_input (retention_timestamp);
CREATE INDEX idx_workflow_output_retention
    ON workflow_output (retention_timestamp);
CREATE INDEX idx_operation_outputs_retention
    ON operation_outputs (retention_timestamp);
CREATE INDEX "idx_workflow_status_in_flight_v2" ON "workflow_status" ("queue_name", "status", "priority", "created_at", "application_name") WHERE "status" IN ('ENQUEUED', 'PENDING');
CREATE INDEX "idx_workflow_status_partition_dequeue_v3" ON "workflow_status" ("queue_name", "status", "queue_partition_key", "priority", "created_at", "workflow_uuid", "application_name") WHERE "status" IN ('ENQUEUED', 'PENDING') AND "queue_partition_key" IS NOT NULL;
CREATE INDEX "idx_operation_outputs_completed_at_function_name_v2" ON "operation_outputs" ("completed_at_epoch_ms", "function_name", "application_name");
CREATE INDEX "idx_workflow_status_deadline" ON "workflow_status" ("workflow_deadline_epoch_ms") WHERE "status" IN ('ENQUEUED', 'PENDING', 'DELAYED') AND "workflow_deadline_epoch_ms" IS NOT NULL;
CREATE INDEX "idx_application_versions_timestamp" ON "application_versions" ("version_timestamp" DESC);
CREATE INDEX "idx_application_versions_owner_timestamp" ON "application_versions" ("application_name", "version_timestamp" DESC);
COMMIT;

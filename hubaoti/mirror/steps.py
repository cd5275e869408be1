"""The tables of the mirror's index, as each step made them; one that was released never changes."""

FIRST = """
create table artifacts (
    digest text primary key, key text not null, recipe text not null, variant text not null,
    size integer not null, added real not null,
    endpoint text not null, repo text not null, revision text not null, path text not null
) strict;
create index artifacts_by_key on artifacts (key);
create table holds (
    digest text not null references artifacts on delete cascade, graph text not null,
    primary key (digest, graph)
) strict;
create index holds_by_graph on holds (graph);
create table pulls (
    endpoint text not null, repo text not null, revision text not null,
    asked text not null, host text not null,
    digest text not null references artifacts on delete cascade, path text not null,
    primary key (endpoint, repo, revision, asked, host)
) strict;
create table built (digest text primary key, key text not null, at real not null) strict;
"""
SECOND = """
create table tested (
    graph text not null, host text not null, problem text not null, at real not null,
    primary key (graph, host)
) strict;
"""
THIRD = """
create table notes (digest text primary key, data blob not null, at real not null) strict;
create index notes_by_age on notes (at);
"""
# It has every column, so that SQLite's own check finds any byte of a row that was changed.
FOURTH = """
create index if not exists artifacts_whole on artifacts (
    digest, key, recipe, variant, size, added, endpoint, repo, revision, path
);
"""
# Every place that an artifact was ever pulled from, which is known when it comes again; and where
# each branch and tag of a repo was last.
FIFTH = """
create table if not exists origins (
    digest text not null, endpoint text not null, repo text not null, revision text not null,
    path text not null, at real not null, primary key (digest, endpoint, repo, revision, path)
) strict;
insert or ignore into origins select digest, endpoint, repo, revision, path, added from artifacts
where repo != '';
create table if not exists seen (
    endpoint text not null, repo text not null, name text not null, revision text not null,
    at real not null, primary key (endpoint, repo, name)
) strict;
"""
# What the mirror keeps itself by. Of an artifact how often it was opened, when last, the age of the
# mirror then, and how long it took to download: remembered when it has left, too. Who pinned it,
# to which repos it was pushed. What was asked for and what came of it; numbers by their names.
SIXTH = """
create table usage (
    digest text primary key, opens integer not null, last real not null, age real not null,
    seconds real not null
) strict;
create table pins (
    digest text not null, holder text not null, at real not null, primary key (digest, holder)
) strict;
create table pushed (
    digest text not null, endpoint text not null, repo text not null, revision text not null,
    at real not null, primary key (digest, endpoint, repo)
) strict;
create table answers (
    tier text not null, reason text not null, what text not null, calls integer not null,
    bytes integer not null, seconds real not null, at real not null,
    primary key (tier, reason, what)
) strict;
create table numbers (name text primary key, value real not null) strict;
"""
# Whose signature of an artifact at which place was verified: each is looked at once.
SEVENTH = """
create table if not exists signed (
    digest text not null, endpoint text not null, repo text not null, path text not null,
    signer text not null, at real not null, primary key (digest, endpoint, repo, path, signer)
) strict;
"""
# What manifests say that is listed of all of them: each is read once, until its file changes.
EIGHTH = """
create table if not exists facts (
    digest text primary key references artifacts on delete cascade, stamp integer not null,
    model text, task text, seconds real not null, kernels text not null
) strict;
create index if not exists facts_whole on facts (digest, stamp, model, task, seconds, kernels);
"""
# The same without the file's time: by its digest a manifest is known for good.
NINTH = """
drop index if exists facts_whole;
drop table if exists facts;
create table facts (
    digest text primary key references artifacts on delete cascade, model text, task text,
    seconds real not null, kernels text not null
) strict;
create index facts_whole on facts (digest, model, task, seconds, kernels);
"""
# What came of graphs was kept by their packages alone, whatever they had been asked, and whoever
# asked it: no artifact is judged by that any more.
TENTH = "delete from tested;"
# From nothing to today's tables.
STEPS = (FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH, EIGHTH, NINTH, TENTH)

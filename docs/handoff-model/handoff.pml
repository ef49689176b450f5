/* The KV handoff protocol, for spin. README.md beside this file says what it shows and what it leaves out.

   One prefill worker (source), one decode worker (reader), their router, and requests that compete for the blocks of
   both. A worker's core is one thread, so everything that a core does with one message is one atomic step here. What
   may come in between, does: single blocks of a pull, a lost stream, a crash, an expiry, a cancel.

       Router(r)     what router/lifecycle.py decides about request r
       Prefill(r)    the prompt of r in the prefill worker: open, compute, announce, finish
       Handoff(h)    the source's half of a handoff: follow, renew, release, expiry
       Decode(r)     r in the decode worker, with the reader's half of its handoff
       Transfer(r)   the pulls of r: copies block by block, then the fence
       Stream, Faults, Quiet: the control stream and its loss, the crash, and what must hold when nothing moves any more

   A block's content is the request that wrote it, as a tag: r + 1; 0 is memory after a restart.

   Every action is a d_step, so the scratch variables are hidden: none of them lives from one action to the next.
   Messages and flags that could have no effect any more are not kept; that halves the states and loses no behaviour.

   Switches remove one rule each (check.py runs them all); with none the model is the protocol. */

#define R 2 /* requests */
#define B 2 /* blocks of request 0; request 1 has one */
#ifdef SHARED_HANDOFF_ID
#define SIZE(r) 1
#else
#define SIZE(r) (B - (r))
#endif
#define ALL(r) ((1 << SIZE(r)) - 1) /* a bit for each */
#ifndef NS
#define NS 2 /* blocks of the source's pool: 2 or 3 */
#endif
#ifndef ND
#define ND 2 /* blocks of the reader's pool: 2 or 3 */
#endif
#ifndef FAULTS
#define FAULTS 0 /* crash, broken stream, timeout or refusal without cause: so many of them, at any moments */
#endif
#ifndef CANCELS
#define CANCELS 0
#endif
#ifndef RENEWALS
#define RENEWALS 0
#endif

#ifdef SHARED_HANDOFF_ID
#define H(r) 0 /* two requests under one handoff id */
#else
#define H(r) (r)
#endif

#define S_FREE ((s_references[0] == 0) + (s_references[1] == 0) + (s_references[NS - 1] == 0 && NS == 3))
#define D_FREE ((d_references[0] == 0) + (d_references[1] == 0) + (d_references[ND - 1] == 0 && ND == 3))
#define AT(r, i) ((r) * B + (i))
#define TAG(r) ((r) + 1)

mtype = { Announced, Final, Refused, Follow, Renew, Release };
mtype = { Nothing, Open, Sealed, Ended };      /* a lease */
mtype = { Queued, Computing, Left };           /* a prompt in the prefill worker; Nothing before */
mtype = { Pulling, Broken, Waiting, Running }; /* a sequence in the decode worker; Nothing before, Left after */
mtype = { New, Split, Local, Over };           /* a request in the router */

/* ---- State. Every field has one writer, as in the code. ---- */

/* The router, and its two command streams: a start comes before its cancel, so flags are enough. */
mtype request[R] = New;
bit epoch_of[R];       /* the incarnation of the source that the request was sent to */
bool p_start[R], p_cancel[R], p_failed[R];
bool d_start[R], d_cancel[R], d_continue[R], d_failed[R];

/* The source: its pool, its engine, its handoffs. */
bool s_up = true, s_returns;
bit s_epoch;
byte s_references[NS], s_generation[NS], s_content[NS];
mtype prompt[R] = Nothing;
byte s_table[R * B], s_computed[R];
mtype lease[R] = Nothing;
byte leased[R * B], announced[R];
bool follower[R], waiting_follow[R];

/* The reader: its pool, its engine, its readings, its pulls (named by request and first index). */
byte d_references[ND], d_content[ND];
mtype sequence[R] = Nothing;
bool has_table[R], final[R];
byte d_table[R * B], heard[R], next_index[R], arrived[R];
byte x_count[R * B], x_copied[R * B];
bool x_wanted[R * B], x_fenced[R * B];
byte x_remote[R * B], x_generation[R * B], x_local[R * B];
#ifdef SHARED_HANDOFF_ID
byte reader_of[R];
#define READER_OF(h) reader_of[h]
#else
#define READER_OF(h) (h)
#endif

/* The control stream. Order across handoffs is not relied on: each has a queue of its own. */
chan to_reader[R] = [5] of { mtype, byte, byte }; /* kind, block, generation */
chan to_source[R] = [3] of { mtype, bool };       /* kind, adopted */
bool stream_broken, s_attached = true, d_attached = true;
bit stream_epoch;

byte faults = FAULTS, cancels = CANCELS, renewals = RENEWALS;

hidden byte i, j, k, b, s, n;

/* ---- The source. ---- */

inline s_unpin(block) {
    assert(s_references[block] > 0); /* given back more often than taken */
    s_references[block]--
}

inline tell(h, kind, x, y) { /* HandoffSource._tell; what nobody reads any more is not kept */
    if
    :: s_attached && d_attached && sequence[READER_OF(h)] == Pulling -> to_reader[h]!kind(x, y)
    :: else
    fi
}

inline forget_lease(h) {
    for (k : 0 .. B - 1) { leased[AT(h, k)] = 0 }
    announced[h] = 0;
    lease[h] = Ended;
    follower[h] = false
}

inline end_lease(h) { /* LeaseTable.end; expiry after it finds nothing more to end */
    for (k : 0 .. B - 1) {
        if :: k < announced[h] -> s_unpin(leased[AT(h, k)]) :: else fi
    }
#ifdef RELEASE_TWICE
    if
    :: lease[h] == Sealed && follower[h] -> follower[h] = false /* released, and still in the table */
    :: else -> forget_lease(h)
    fi
#else
    forget_lease(h)
#endif
}

inline end_with_refusal(h) { /* HandoffSource._end, _forget */
    if :: follower[h] -> tell(h, Refused, 0, 0) :: else fi;
    end_lease(h)
}

inline leave_engine(r) { /* EngineCore.drop, cancel */
    if
    :: prompt[r] == Computing ->
        for (k : 0 .. SIZE(r) - 1) { s_unpin(s_table[AT(r, k)]); s_table[AT(r, k)] = 0 }
    :: else
    fi;
    s_computed[r] = 0;
    prompt[r] = Left
}

inline s_allocate(r, from_the_end) { /* BlockPool.allocate; both orders, because stale pulls tell blocks apart */
    for (i : 0 .. SIZE(r) - 1) {
        for (k : 0 .. NS - 1) {
            b = (from_the_end -> k : NS - 1 - k);
            if :: s_references[b] == 0 -> n = b :: else fi
        }
        b = n;
        assert(s_references[b] == 0);
        for (k : 0 .. R - 1) { /* nobody else may have it */
            for (j : 0 .. B - 1) {
                assert(!(prompt[k] == Computing && j < SIZE(k) && s_table[AT(k, j)] == b));
                assert(!(j < announced[k] && leased[AT(k, j)] == b))
            }
        }
#if !defined(FREE_ON_EXPIRY_WITHOUT_GENERATION) && !defined(GENERATION_AFTER_WRITE)
        s_generation[b]++;
#endif
#ifdef GENERATION_AFTER_WRITE
        s_content[b] = TAG(r);
#endif
        printf("source: block %d is for request %d, generation %d\n", b, r, s_generation[b]);
        s_references[b] = 1;
        s_table[AT(r, i)] = b
    }
}

proctype Prefill(byte r) {
end:do
    :: d_step { s_up && p_start[r] && lease[H(r)] == Nothing -> /* PrefillCore._admit, HandoffSource.open */
        printf("source: opens handoff %d for request %d\n", H(r), r);
        p_start[r] = false;
        lease[H(r)] = Open;
        prompt[r] = Queued;
        follower[H(r)] = waiting_follow[H(r)];
        waiting_follow[H(r)] = false }
#ifdef SHARED_HANDOFF_ID
    :: d_step { s_up && p_start[r] && lease[H(r)] != Nothing -> /* the id was used before */
        p_start[r] = false;
        prompt[r] = Left;
        p_failed[r] = (request[r] == Split) }
#endif
    :: d_step { s_up && p_start[r] && faults > 0 -> /* draining */
        printf("source: does not take request %d\n", r);
        faults--;
        p_start[r] = false;
        prompt[r] = Left;
        p_failed[r] = (request[r] == Split) }
    :: d_step { s_up && prompt[r] == Queued && S_FREE >= SIZE(r) -> /* EngineCore.schedule */
        s_allocate(r, false);
        prompt[r] = Computing }
    :: d_step { s_up && prompt[r] == Queued && S_FREE >= SIZE(r) ->
        s_allocate(r, true);
        prompt[r] = Computing }
    :: d_step { s_up && prompt[r] == Computing -> /* PrefillCore._announce_up_to, _ended */
        b = s_table[AT(r, s_computed[r])];
        s_content[b] = TAG(r);
#ifdef GENERATION_AFTER_WRITE
        s_generation[b]++;
#endif
        assert(lease[H(r)] == Open);
        s_references[b]++;
        leased[AT(H(r), announced[H(r)])] = b;
        announced[H(r)]++;
        s_computed[r]++;
        printf("source: block %d is written for request %d and announced, %d of %d\n", b, r, s_computed[r], SIZE(r));
        if
        :: s_computed[r] < SIZE(r) ->
            if :: follower[H(r)] -> tell(H(r), Announced, b, s_generation[b]) :: else fi
        :: else ->
            if :: follower[H(r)] -> tell(H(r), Final, b, s_generation[b]) :: else fi;
            lease[H(r)] = Sealed;
            leave_engine(r)
        fi }
    :: d_step { s_up && prompt[r] == Computing && faults > 0 -> /* PrefillCore._fail: leases hold their share */
        printf("source: gives up request %d\n", r);
        faults--;
        p_failed[r] = (request[r] == Split);
        leave_engine(r);
        end_with_refusal(H(r)) }
    :: d_step { s_up && p_cancel[r] && !p_start[r] -> /* PrefillCore._end_by_us */
        printf("source: cancels request %d\n", r);
        p_cancel[r] = false;
        if
        :: prompt[r] == Queued || prompt[r] == Computing -> leave_engine(r); end_with_refusal(H(r))
        :: else /* never started, or handed over */
        fi }
    od
}

#ifdef EXPIRE_OPEN
#define MAY_EXPIRE(h) (lease[h] == Sealed || lease[h] == Open)
#else
#define MAY_EXPIRE(h) (lease[h] == Sealed)
#endif

proctype Handoff(byte h) {
    bool adopted;
end:do
    :: d_step { s_up && s_attached && to_source[h]?[Follow, _] -> /* HandoffSource._follow */
        to_source[h]?Follow(_);
        printf("source: handoff %d is followed\n", h);
        if
        :: lease[h] == Open || lease[h] == Sealed ->
            follower[h] = true;
            for (i : 0 .. B - 1) {
                if
                :: i < announced[h] && !(lease[h] == Sealed && i == announced[h] - 1) ->
                    tell(h, Announced, leased[AT(h, i)], s_generation[leased[AT(h, i)]])
                :: i < announced[h] && lease[h] == Sealed && i == announced[h] - 1 ->
                    tell(h, Final, leased[AT(h, i)], s_generation[leased[AT(h, i)]])
                :: else
                fi
            }
#ifdef FORGET_ENDED
        :: lease[h] == Ended /* no answer */
#else
        :: lease[h] == Ended -> tell(h, Refused, 0, 0)
#endif
#ifdef FORGET_EARLY_FOLLOW
        :: lease[h] == Nothing /* not kept */
#else
        :: lease[h] == Nothing -> waiting_follow[h] = true
#endif
        fi }
    :: d_step { s_up && s_attached && to_source[h]?[Renew, _] -> /* when it expires is free anyway */
        to_source[h]?Renew(_);
        if
        :: (lease[h] == Nothing || lease[h] == Ended) && !waiting_follow[h] -> tell(h, Refused, 0, 0)
        :: else
        fi }
    :: d_step { s_up && s_attached && to_source[h]?[Release, _] -> /* HandoffSource._release */
        to_source[h]?Release(adopted);
        adopted = false;
        if
        :: waiting_follow[h] -> waiting_follow[h] = false
        :: else ->
            if
#ifdef RELEASE_ENDS_OPEN
            :: follower[h] && lease[h] == Open -> end_lease(h)
#else
            :: follower[h] && lease[h] == Open -> follower[h] = false /* its owner decides */
#endif
            :: follower[h] && lease[h] == Sealed ->
                end_lease(h);
                printf("source: lease of handoff %d is released\n", h)
            :: else
            fi
        fi }
#ifndef NO_EXPIRY
    :: d_step { s_up && MAY_EXPIRE(h) -> /* LeaseTable.expire */
        printf("source: lease of handoff %d expires\n", h);
        end_with_refusal(h) }
#endif
    :: d_step { s_up && waiting_follow[h] -> /* follow_wait_s is over */
        printf("source: nobody opened handoff %d\n", h);
        waiting_follow[h] = false;
        tell(h, Refused, 0, 0) }
    od
}

/* ---- The reader. ---- */

inline d_unpin(block) {
    assert(d_references[block] > 0); /* given back more often than taken */
    d_references[block]--
}

inline d_allocate(r) { /* the first: free blocks are alike here, nobody looks at what is in them */
    for (i : 0 .. SIZE(r) - 1) {
        for (k : 0 .. ND - 1) { if :: d_references[ND - 1 - k] == 0 -> b = ND - 1 - k :: else fi }
        for (k : 0 .. R - 1) {
            for (j : 0 .. B - 1) {
                assert(!(has_table[k] && j < SIZE(k) && d_table[AT(k, j)] == b));
                for (n : 0 .. B - 1) { /* bytes may still land there: quarantine */
                    assert(!(x_count[AT(k, j)] > n && x_local[AT(k, j + n)] == b))
                }
            }
        }
        printf("reader: block %d is for request %d\n", b, r);
        d_references[b] = 1;
        d_table[AT(r, i)] = b
    }
    has_table[r] = true
}

inline d_free(r) {
    if
    :: has_table[r] -> for (k : 0 .. SIZE(r) - 1) { d_unpin(d_table[AT(r, k)]); d_table[AT(r, k)] = 0 }
    :: else
    fi;
    has_table[r] = false
}

inline say(r, kind, value) {
    if
    :: s_attached && d_attached && !(kind == Release && lease[H(r)] == Ended) -> to_source[H(r)]!kind(value)
    :: else /* lost, or without effect */
    fi
}

inline give_back(s) {
    for (k : 0 .. B - 1) { if :: k < x_count[s] -> d_unpin(x_local[s + k]) :: else fi }
}

inline settle(r, s) { /* HandoffReader._settle: nothing can land any more */
#ifdef NO_QUARANTINE
    if :: x_wanted[s] -> give_back(s) :: else fi;
#else
    give_back(s);
#endif
    for (k : 0 .. B - 1) {
        if :: k < x_count[s] -> x_local[s + k] = 0; x_remote[s + k] = 0; x_generation[s + k] = 0 :: else fi
    }
    x_count[s] = 0;
    x_copied[s] = 0;
    x_wanted[s] = false;
    x_fenced[s] = false
}

inline fence(r, s) { /* NixlTransport._verify: are the generations those that were announced? */
    for (k : 0 .. B - 1) {
        if
        :: k < x_count[s] && s_generation[x_remote[s + k]] != x_generation[s + k] -> x_fenced[s] = true
        :: else
        fi
    }
}

inline pull_more(r) { /* HandoffReader._pull_more: one pull for all that is announced and not asked for */
    if
    :: has_table[r] && next_index[r] < heard[r] ->
        s = AT(r, next_index[r]);
        x_count[s] = heard[r] - next_index[r];
        x_wanted[s] = true;
        for (k : 0 .. B - 1) {
            if
            :: k < x_count[s] ->
                x_local[s + k] = d_table[s + k];
                d_references[x_local[s + k]]++
            :: else
            fi
        }
        next_index[r] = heard[r];
#ifdef FENCE_FIRST
        fence(r, s);
#endif
        printf("reader: asks for %d block(s) of request %d\n", x_count[s], r)
    :: else
    fi
}

inline drop_reading(r, tell_it, value) { /* HandoffReader._drop; pulls under way go to quarantine */
    for (i : 0 .. B - 1) {
#ifdef NO_QUARANTINE
        if :: x_wanted[AT(r, i)] -> give_back(AT(r, i)) :: else fi;
#endif
        x_wanted[AT(r, i)] = false;
        if :: i >= next_index[r] -> x_remote[AT(r, i)] = 0; x_generation[AT(r, i)] = 0 :: else fi
    }
    if :: tell_it -> say(r, Release, value) :: else fi;
    if :: READER_OF(H(r)) == r -> do :: to_reader[H(r)]?_, _, _ :: empty(to_reader[H(r)]) -> break od :: else fi;
    final[r] = false;
    heard[r] = 0;
    next_index[r] = 0
}

inline check_kept(r) { /* leading blocks that arrived verified may be published: they must be ours */
    if :: has_table[r] && (arrived[r] & 1) -> assert(d_content[d_table[AT(r, 0)]] == TAG(r)) :: else fi;
    if :: has_table[r] && arrived[r] == 3 -> assert(d_content[d_table[AT(r, 1)]] == TAG(r)) :: else fi;
    arrived[r] = 0
}

inline break_reading(r, tell_it) { /* HandoffReader._break, DecodeCore._broken */
    drop_reading(r, tell_it, false);
    printf("reader: handoff of request %d is broken\n", r);
    sequence[r] = Broken;
    d_failed[r] = (request[r] == Split)
}

#ifdef EAGER_ADOPT
#define ARRIVED(r) (next_index[r] == SIZE(r))
#else
#define ARRIVED(r) (arrived[r] == ALL(r))
#endif

inline complete_if_done(r) { /* HandoffReader._complete_if_done, DecodeCore._adopt */
    if
    :: final[r] && has_table[r] && ARRIVED(r) ->
        printf("reader: adopts request %d\n", r);
        for (k : 0 .. SIZE(r) - 1) { assert(d_content[d_table[AT(r, k)]] == TAG(r)) } /* adopted what is not ours */
        drop_reading(r, true, true);
        arrived[r] = 0;
        sequence[r] = Running
    :: else
    fi
}

inline note(r, block, generation) { /* HandoffReader._announced */
    x_remote[AT(r, heard[r])] = block;
    x_generation[AT(r, heard[r])] = generation;
    heard[r]++
}

proctype Decode(byte r) {
end:do
    /* From the router. */
    :: d_step { d_start[r] && d_attached && stream_epoch == epoch_of[r] -> /* HandoffReader.begin */
        d_start[r] = false;
#ifdef SHARED_HANDOFF_ID
        reader_of[H(r)] = r;
#endif
        printf("reader: follows handoff %d for request %d\n", H(r), r);
        sequence[r] = Pulling;
        say(r, Follow, false) }
    :: d_step { d_start[r] && !(s_up && s_epoch == epoch_of[r]) -> /* PeerLinks.send: no such peer */
        d_start[r] = false;
        break_reading(r, false) }
    :: d_step { d_continue[r] && !d_start[r] -> /* DecodeCore._continue_locally, EngineCore.continue_locally */
        d_continue[r] = false;
        if
        :: sequence[r] == Pulling || sequence[r] == Broken ->
            if :: sequence[r] == Pulling -> drop_reading(r, true, false) :: else fi;
            printf("reader: request %d goes on locally\n", r);
            check_kept(r);
            d_free(r);
            sequence[r] = Waiting
        :: else /* adopted already, or gone */
        fi }
    :: d_step { d_cancel[r] && !d_start[r] -> /* DecodeCore._end_by_us */
        printf("reader: cancels request %d\n", r);
        d_cancel[r] = false;
        d_continue[r] = false;
        if :: sequence[r] == Pulling -> drop_reading(r, true, false) :: else fi;
        d_free(r);
        arrived[r] = 0;
        sequence[r] = Left }
    /* From the source. */
    :: d_step { READER_OF(H(r)) == r && sequence[r] == Pulling && to_reader[H(r)]?[Announced, _, _] ->
        to_reader[H(r)]?Announced(b, n);
        note(r, b, n);
        pull_more(r) }
    :: d_step { READER_OF(H(r)) == r && sequence[r] == Pulling && to_reader[H(r)]?[Final, _, _] ->
        to_reader[H(r)]?Final(b, n);
        note(r, b, n);
        final[r] = true;
        pull_more(r);
        complete_if_done(r) }
    :: d_step { READER_OF(H(r)) == r && sequence[r] == Pulling && to_reader[H(r)]?[Refused, _, _] ->
        to_reader[H(r)]?Refused(_, _);
        break_reading(r, true) }
    /* Room, time. */
    :: d_step { sequence[r] == Pulling && heard[r] > 0 && !has_table[r] -> /* DecodeCore._try_reserve */
        if
        :: D_FREE >= SIZE(r) -> d_allocate(r); pull_more(r)
        :: D_FREE < SIZE(r) -> break_reading(r, true) /* room_wait_s is over */
        fi }
    :: d_step { sequence[r] == Pulling && faults > 0 -> /* a deadline, a digest, a stalled pull */
        faults--;
        break_reading(r, true) }
    :: d_step { sequence[r] == Pulling && renewals > 0 && empty(to_source[H(r)]) ->
#ifndef ENDLESS_RENEWAL
        renewals--;
#endif
        say(r, Renew, false) }
    /* The engine. */
    :: d_step { sequence[r] == Waiting && D_FREE >= SIZE(r) -> /* the prompt is computed here */
        d_allocate(r);
        for (k : 0 .. SIZE(r) - 1) { d_content[d_table[AT(r, k)]] = TAG(r) }
        printf("reader: request %d is computed here\n", r);
        sequence[r] = Running }
    :: d_step { sequence[r] == Running -> /* the answer ends; until here every step has read these blocks */
        for (k : 0 .. SIZE(r) - 1) { assert(d_content[d_table[AT(r, k)]] == TAG(r)) }
        printf("reader: the answer of request %d ends\n", r);
        d_free(r);
        sequence[r] = Left;
        request[r] = Over;
        p_failed[r] = false;
        d_failed[r] = false }
    od
}

/* ---- The data plane: one-sided, no core takes part. ---- */

#define READABLE(r) (s_up && s_epoch == epoch_of[r])
#ifdef WRITE_MODE /* the source writes: final when it says so, or when a successor shows that it is gone */
#define MOVES(r) (READABLE(r) || (d_attached && stream_epoch != epoch_of[r]))
#else /* the transport reports a dead source as an error, and then nothing can land */
#define MOVES(r) true
#endif

inline finish_pull(r, s, arrived_whole) { /* HandoffReader.on_transport; PullFinal for one that nobody waits for */
    if
    :: x_wanted[s] && arrived_whole ->
        arrived[r] = arrived[r] | (((1 << x_count[s]) - 1) << (s - AT(r, 0)));
        settle(r, s);
        complete_if_done(r)
    :: x_wanted[s] && !arrived_whole -> settle(r, s); break_reading(r, true)
    :: else -> settle(r, s)
    fi
}

inline step_pull(r, s) {
    if
    :: READABLE(r) && x_copied[s] < x_count[s] ->
        d_content[x_local[s + x_copied[s]]] = s_content[x_remote[s + x_copied[s]]];
        printf("pull: copies source block %d (content %d) into block %d for request %d (content %d)\n",
               x_remote[s + x_copied[s]], s_content[x_remote[s + x_copied[s]]], x_local[s + x_copied[s]], r, TAG(r));
        x_copied[s]++
    :: READABLE(r) && x_copied[s] == x_count[s] ->
#if !defined(NO_FENCE) && !defined(FENCE_FIRST)
        fence(r, s);
#endif
        if
        :: x_fenced[s] -> printf("pull: fence of request %d differs\n", r); finish_pull(r, s, false)
        :: else -> printf("pull: fence of request %d holds\n", r); finish_pull(r, s, true)
        fi
    :: !READABLE(r) ->
        printf("pull: request %d ends with an error\n", r);
        finish_pull(r, s, false)
    fi
}

proctype Transfer(byte r) {
end:do
    :: d_step { x_count[AT(r, 0)] > 0 && MOVES(r) -> s = AT(r, 0); step_pull(r, s) }
    :: d_step { r == 0 && x_count[AT(r, 1)] > 0 && MOVES(r) -> s = AT(r, 1); step_pull(r, s) }
    od
}

/* ---- The router. ---- */

inline go_local(r) { /* Life._continue_on */
    p_failed[r] = false;
    d_failed[r] = false;
    p_cancel[r] = p_start[r] || prompt[r] == Queued || prompt[r] == Computing;
    d_continue[r] = d_start[r] || sequence[r] == Pulling || sequence[r] == Broken;
    request[r] = Local
}

proctype Router(byte r) {
end:do
    :: d_step { request[r] == New && s_up -> /* Life._dispatch: both legs at the same moment */
        printf("router: request %d is split\n", r);
        request[r] = Split;
        epoch_of[r] = s_epoch;
        p_start[r] = true;
        d_start[r] = true }
    :: d_step { request[r] == New && !s_up -> request[r] = Local; sequence[r] = Waiting }
    /* on_handoff_failed; _leg_failed of the prefill leg */
    :: d_step { request[r] == Split && (d_failed[r] || p_failed[r]) -> go_local(r) }
    :: d_step { (request[r] == Split || request[r] == Local) && cancels > 0 -> /* by the client, by the deadline */
        cancels--;
        p_failed[r] = false;
        d_failed[r] = false;
        p_cancel[r] = p_start[r] || prompt[r] == Queued || prompt[r] == Computing;
        d_continue[r] = false;
#ifndef FORGET_CANCEL_BETWEEN_LEGS
        d_cancel[r] = true;
#endif
        printf("router: request %d is cancelled\n", r);
        request[r] = Over }
    od
}

/* ---- What goes wrong. ---- */

inline flush(queue) { do :: nempty(queue) -> queue?_, _ :: empty(queue) -> break od }

inline reader_lost() { /* HandoffSource.on_reader_lost */
    for (i : 0 .. R - 1) { follower[i] = false; waiting_follow[i] = false; flush(to_source[i]) }
}

inline attach() {
    stream_broken = false;
    s_attached = true;
    d_attached = true;
    stream_epoch = s_epoch;
    printf("stream: stands again\n")
}

proctype Stream() {
end:do
    :: d_step { stream_broken && d_attached -> /* HandoffReader.on_source_lost */
        d_attached = false;
        for (j : 0 .. R - 1) {
#ifndef SILENT_LOSS
            if :: sequence[j] == Pulling -> break_reading(j, false) :: else fi
#else
            do :: to_reader[j]?_, _, _ :: empty(to_reader[j]) -> break od
#endif
        }
        printf("reader: hears that the stream is lost\n") }
    :: d_step { stream_broken && s_attached -> reader_lost(); s_attached = false }
    :: d_step { stream_broken && !d_attached && s_up -> reader_lost(); attach() }
    :: d_step { stream_broken && !d_attached && s_up && s_attached -> /* replaced: its end is not told */
        for (i : 0 .. R - 1) { flush(to_source[i]) }
        attach() }
    od
}

#define BUSY(r) (request[r] == New || request[r] == Split || lease[r] == Open || lease[r] == Sealed || \
                 x_count[AT(r, 0)] > 0 || x_count[AT(r, 1)] > 0)

proctype Faults() {
end:do
    :: d_step { faults > 0 && !stream_broken && (BUSY(0) || BUSY(1)) ->
        faults--;
        stream_broken = true;
        printf("stream: breaks\n") }
    :: d_step { faults > 0 && s_up && (BUSY(0) || BUSY(1)) -> /* the process is gone, and all its memory */
        printf("source: dies\n");
        faults--;
        s_up = false;
        stream_broken = true;
        s_attached = false;
        for (k : 0 .. NS - 1) { s_references[k] = 0; s_generation[k] = 0; s_content[k] = 0 }
        for (i : 0 .. R - 1) {
            prompt[i] = Nothing;
            s_computed[i] = 0;
            lease[i] = Nothing;
            announced[i] = 0;
            p_start[i] = false;
            p_cancel[i] = false;
            p_failed[i] = (request[i] == Split);
            for (k : 0 .. B - 1) { s_table[AT(i, k)] = 0; leased[AT(i, k)] = 0 }
        }
        reader_lost();
        s_returns = true }
#ifndef SOURCE_RETURNS
    :: d_step { s_returns -> s_returns = false; printf("source: is gone for good\n") }
#endif
    :: d_step { s_returns -> 
        s_returns = false;
        s_up = true;
#ifndef REUSE_EPOCH
        s_epoch++;
#endif
        printf("source: starts again, epoch %d\n", s_epoch) }
    od
}

/* When nothing can move, everything has ended and every block is free. */
proctype Quiet() {
    timeout ->
    d_step {
        for (i : 0 .. R - 1) {
            assert(request[i] == Over && sequence[i] == Left);
            assert(prompt[i] == Nothing || prompt[i] == Left);
            assert(lease[i] == Nothing || lease[i] == Ended);
            assert(!waiting_follow[i]);
            for (k : 0 .. B - 1) { assert(x_count[AT(i, k)] == 0) }
        }
        for (k : 0 .. NS - 1) { assert(s_references[k] == 0) }
        for (k : 0 .. ND - 1) { assert(d_references[k] == 0) }
    }
}

init {
    atomic {
        for (i : 0 .. R - 1) { run Router(i); run Prefill(i); run Handoff(i); run Decode(i); run Transfer(i) }
        run Stream();
        run Faults();
        run Quiet()
    }
}

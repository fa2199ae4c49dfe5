//! Another process in the place of this one, under its clients: nothing is cut or refused, what was learned goes along;
//! and a successor that is not fit to serve changes nothing.

use crate::support::client::{Line, Request};
use crate::support::engine::{Answer, Engine, Gate, delta};
use crate::support::proxy::{Proxy, binary, folder, is_alive, signal};
use crate::support::stage::{answered, before, chat, counts, sent, total};
use crate::support::{one_upstream, wait_until, within};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

const LINES: [Line; 4] = [Line::Http1, Line::Http2, Line::Http1Tls, Line::Http2Tls];

#[tokio::test]
async fn streams_end_whole_and_kept_connections_are_told_before_they_close() {
    let gate = Gate::new();
    let script = gate.clone();
    let engine =
        Engine::start(move |seen| match String::from_utf8_lossy(&seen.body).contains("\"stream\":true") {
            true => {
                Answer::stream().event(&delta("a")).wait(&script).event(&delta("b")).event("[DONE]").end()
            }
            false => Answer::json(200, "{}"),
        });
    let mut proxy = before(std::slice::from_ref(&engine), "").await;
    let (mut streams, mut kept) = (Vec::new(), Vec::new());
    for line in LINES {
        let mut client = proxy.client(line).await;
        client.send(&Request::streamed("tiny", "hello")).await;
        client.head().await;
        client.piece().await.unwrap();
        streams.push(client);
        let mut client = proxy.client(line).await;
        assert_eq!(client.ask(&chat()).await.status, 200);
        kept.push((line, client));
    }
    let [old] = proxy.processes()[..] else { panic!("{:?}", proxy.processes()) };
    let new = proxy.upgrade().await;
    assert!(new != old && is_alive(old));
    for (line, mut client) in kept {
        // An HTTP/2 client has been told to open a connection anew, and would.
        if matches!(line, Line::Http1 | Line::Http1Tls) {
            let answer = client.ask(&chat()).await;
            assert_eq!((answer.status, answer.header("connection")), (200, Some("close")), "{line:?}");
        }
    }
    for line in LINES {
        // The old process still accepts for a moment, and says that it closes.
        wait_until("the successor to answer", async || {
            let answer = proxy.client(line).await.ask(&chat()).await;
            assert_eq!(answer.status, 200, "{line:?}");
            answer.header("connection") != Some("close")
        })
        .await;
    }
    assert!(proxy.metrics().await.has("plimsoll_upgrades_total", &[("result", "ok")]));
    for mut client in streams {
        gate.open();
        let (rest, complete) = client.rest().await;
        assert!(complete && String::from_utf8_lossy(&rest).ends_with("data: [DONE]\n\n"));
    }
    // With the last connection the old process ends, and the new one stays.
    assert!(proxy.exit().await.success());
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    proxy.assert_at_rest().await;
    signal("TERM", new);
    wait_until("the successor to end", async || !is_alive(new)).await;
}

#[tokio::test]
async fn five_upgrades_under_load_fail_nothing() {
    let engines: [Engine; 2] = std::array::from_fn(|_| Engine::streaming(&["a", "b", "c"]));
    let proxy = before(&engines, "").await;
    let over = std::sync::atomic::AtomicBool::new(false);
    let is_over = || over.load(std::sync::atomic::Ordering::SeqCst);
    let client = async |line: Line| {
        let mut client = proxy.client(line).await;
        let mut count = 0;
        while !is_over() {
            client.send(&Request::streamed("tiny", "hello")).await;
            let head = client.head().await;
            let (body, complete) = client.rest().await;
            assert!(head.status == 200 && complete, "{line:?} {} {body:?}", head.status);
            count += 1;
            // Over HTTP/2 the test's client does not read GOAWAY: it comes anew each time.
            if head.header("connection") == Some("close") || matches!(line, Line::Http2 | Line::Http2Tls) {
                client = proxy.client(line).await;
            }
        }
        count
    };
    let upgrades = async {
        for _ in 0..5 {
            proxy.upgrade().await;
        }
        over.store(true, std::sync::atomic::Ordering::SeqCst);
    };
    let (asked, ()) = futures::join!(futures::future::join_all(LINES.map(client)), upgrades);
    assert!(asked.iter().all(|&count| count > 5), "{asked:?}");
    let processes = proxy.processes();
    assert_eq!(processes.len(), 6);
    wait_until("all but the last to end", async || {
        processes[..5].iter().all(|pid| !is_alive(*pid)) && is_alive(processes[5])
    })
    .await;
    proxy.assert_at_rest().await;
}

#[tokio::test]
async fn a_file_with_mistakes_and_a_stray_quit_change_nothing() {
    let engine = Engine::good();
    let proxy = before(std::slice::from_ref(&engine), "").await;
    proxy.signal("QUIT");
    wait_until("the refusal", async || proxy.log().contains("SIGQUIT refused")).await;
    proxy.rewrite("upstreams: { llm: { backend: 7 } }\n");
    proxy.signal("USR2");
    proxy.counts("plimsoll_upgrades_total", &[("result", "failed")], 1.0).await;
    assert!(
        proxy.log().contains("not upgraded") && proxy.log().contains("plimsoll.yaml:6:"),
        "{}",
        proxy.log()
    );
    assert_eq!(proxy.processes().len(), 1);
    assert_ne!(proxy.ask(&chat()).await.header("connection"), Some("close"));
    let upgrade = || {
        let output = Command::new(binary()).args(["upgrade", "--config"]).arg(proxy.file()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    assert_eq!(upgrade().0, Some(78), "it cannot be told whom to ask");
    proxy.rewrite(&one_upstream(&["no-such-host.invalid:8000".to_owned()], ""));
    let (code, said) = upgrade();
    assert!(
        code == Some(1) && said.contains("does not resolve") && said.contains("nothing has changed"),
        "{said}"
    );
    proxy.rewrite(&one_upstream(&[engine.address()], "policy: round_robin"));
    let (code, said) = upgrade();
    wait_until("the successor to say so", async || proxy.processes().len() == 2).await;
    let serves = format!("upgraded: process {} serves; 0 requests end in process ", proxy.processes()[1]);
    assert!(code == Some(0) && said.starts_with(&serves), "{said}");
    assert_eq!(proxy.ask(&chat()).await.status, 200);
}

#[tokio::test]
async fn a_binary_that_does_not_start_hangs_or_is_gone_changes_nothing() {
    let engine = Engine::good();
    let installed = folder().join("plimsoll");
    std::fs::copy(binary(), &installed).unwrap();
    let proxy = Proxy::start_binary(&installed, &one_upstream(&[engine.address()], "")).await;
    let [pid] = proxy.processes()[..] else { panic!() };
    let install = |script: &str| {
        let new = installed.with_extension("new");
        std::fs::write(&new, script).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&new, &installed).unwrap();
    };
    let fails = async |times: f64, why: &str| {
        signal("USR2", pid);
        proxy.counts("plimsoll_upgrades_total", &[("result", "failed")], times).await;
        assert!(proxy.log().contains(why), "{why} is not in\n{}", proxy.log());
        assert_ne!(proxy.ask(&chat()).await.header("connection"), Some("close"));
    };
    install("#!/bin/sh\nexit 3\n");
    fails(1.0, "exit status: 3").await;
    // Takes the sockets, says nothing and closes its ears.
    install("#!/bin/sh\nexec <&-\nexec sleep 1000\n");
    fails(2.0, "not fit to serve").await;
    std::fs::remove_file(&installed).unwrap();
    fails(3.0, "No such file").await;
    std::fs::copy(binary(), &installed).unwrap();
    let new = proxy.upgrade().await;
    assert_ne!(new, pid);
    assert_eq!(proxy.ask(&chat()).await.status, 200);
    std::fs::remove_dir_all(installed.parent().unwrap()).unwrap();
}

#[tokio::test]
async fn what_was_learned_goes_along() {
    let engines: [Engine; 3] = std::array::from_fn(|_| Engine::good());
    // Probed once in an hour: what the successor knows of health it has been told.
    let probe = "probe: { interval: 200ms, timeout: 1s, down_after: 2, up_after: 1 }";
    let proxy = before(&engines, &format!("engine: vllm, {probe}")).await;
    engines[0].set_health(503);
    let down = [("backend", &*engines[0].address())];
    proxy.counts("plimsoll_backend_up", &down, 0.0).await;
    let long = |n: usize| Request::chat("tiny", &format!("{n} ").repeat(4_000));
    // One after the other, so that only the prefix tells the backends apart.
    let mut homes = Vec::new();
    for n in 0..6 {
        engines.iter().for_each(Engine::forget);
        assert_eq!(proxy.ask(&long(n)).await.status, 200);
        homes.push(counts(&engines));
    }
    proxy.upgrade().await;
    for (n, home) in homes.iter().enumerate() {
        engines.iter().for_each(Engine::forget);
        assert_eq!(proxy.ask(&long(n)).await.status, 200);
        assert_eq!(&counts(&engines), home, "prompt {n}");
    }
    assert_eq!(homes.iter().map(|home| home[0]).sum::<usize>(), 0, "it was down all the time");
    engines[0].set_health(200);
    proxy.counts("plimsoll_backend_up", &down, 1.0).await;
}

#[tokio::test]
async fn the_successor_knows_what_is_still_in_flight_in_the_process_before() {
    let gate = Gate::new();
    let script = gate.clone();
    let held = Engine::start(move |_| Answer::json(200, "{}").held_at(&script));
    let good = Engine::good();
    let more = "policy: least_connections, max_requests: 2, queue: { length: 8 }";
    let proxy = before(std::slice::from_ref(&held), more).await;
    let both = one_upstream(&[held.address(), good.address()], more);
    let waiting = [sent(&proxy, Line::Http1).await, sent(&proxy, Line::Http2).await];
    gate.reached(2).await;
    proxy.rewrite(&both);
    proxy.upgrade().await;
    // Shown, so that nobody takes the backend for drained.
    proxy.counts("plimsoll_active_requests", &[("backend", &held.address())], 2.0).await;
    // All that this process has is idle. But the first backend is full with requests of the other one.
    wait_until("the news of it", async || {
        held.forget();
        proxy.ask(&chat()).await;
        proxy.ask(&chat()).await;
        good.count() >= 2
    })
    .await;
    for _ in 0..8 {
        assert_eq!(proxy.ask(&chat()).await.status, 200);
    }
    assert_eq!(held.count(), 0);
    gate.open();
    gate.open();
    for client in waiting {
        assert_eq!(answered(client).await, 200);
    }
    wait_until("its end to be known", async || {
        // Held or not: whoever asks now may get there.
        gate.open();
        let mut client = sent(&proxy, Line::Http1).await;
        within("an answer", client.head()).await;
        held.count() > 0
    })
    .await;
}

#[tokio::test]
async fn systemd_hears_of_the_start_the_reload_the_upgrade_and_the_end_from_who_serves() {
    let gate = Gate::new();
    let script = gate.clone();
    let engine =
        Engine::start(move |_| Answer::stream().event(&delta("a")).wait(&script).event("[DONE]").end());
    let folder = folder();
    let path = folder.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let heard = || {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).expect("a datagram in time");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let next = |wanted: &str| loop {
        let said = heard();
        if said != "WATCHDOG=1" {
            assert!(said.starts_with(wanted), "{said:?} and not {wanted}");
            return said;
        }
    };
    let environment = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "300000")];
    let mut proxy = Proxy::spawn(&one_upstream(&[engine.address()], ""), &environment);
    assert!(next("READY=1").contains("STATUS=serving on 127.0.0.1:"));
    proxy.listens().await;
    while heard() != "WATCHDOG=1" {}
    let reload = proxy.admin(&Request::post("/reload", "")).await;
    assert_eq!(reload.status, 200);
    assert!(next("RELOADING=1\nMONOTONIC_USEC=").trim_end().ends_with(|c: char| c.is_ascii_digit()));
    next("READY=1");
    let new = proxy.upgrade().await;
    next("RELOADING=1");
    assert_eq!(next("MAINPID="), format!("MAINPID={new}"));
    next("READY=1");
    assert!(proxy.exit().await.success());
    // The watchdog is fed by who serves now, to its end.
    while heard() != "WATCHDOG=1" {}
    let mut stream = proxy.client(Line::Http1).await;
    stream.send(&Request::streamed("tiny", "hello")).await;
    stream.head().await;
    signal("TERM", new);
    next("STOPPING=1");
    while heard() != "WATCHDOG=1" {}
    gate.open();
    assert!(stream.rest().await.1);
    wait_until("the end", async || !is_alive(new)).await;
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test]
async fn a_socket_that_systemd_holds_refuses_nobody_while_there_is_no_process() {
    let engine = Engine::good();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let folder = folder();
    let file = folder.join("plimsoll.yaml");
    let yaml = format!("listeners: [{{ address: '{address}' }}]\n{}", one_upstream(&[engine.address()], ""));
    std::fs::write(&file, yaml).unwrap();
    // As systemd starts a service: the socket is descriptor 3, and its own process id is told to it.
    let start = || {
        Command::new("sh")
            .args(["-c", r#"exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" run --config "$1""#])
            .arg(binary())
            .arg(&file)
            .stdin(std::os::fd::OwnedFd::from(listener.try_clone().unwrap()))
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut asked = 0;
    for end in ["KILL", "TERM"] {
        let early = crate::support::client::Client::connect(address, Line::Http1).await;
        let mut process = start();
        let mut early = early;
        assert_eq!(early.ask(&chat()).await.status, 200);
        asked += 1;
        signal(end, process.id());
        process.wait().unwrap();
    }
    assert_eq!(total(std::slice::from_ref(&engine)), asked);
    // One that is no listener's would be a place where everybody waits for ever.
    let other = crate::support::port::Port::take();
    let yaml = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, yaml.replace(&address.to_string(), &other.address().to_string())).unwrap();
    assert_eq!(start().wait().unwrap().code(), Some(1));
    std::fs::remove_dir_all(&folder).unwrap();
}

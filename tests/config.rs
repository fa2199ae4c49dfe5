//! What `plimsoll check` says of a broken file is what `tests/config/` has on record; and every file in
//! `conf/` is sound.
//!
//! Golden pairs: `x.yaml` is broken, `x.txt` is what the real binary prints about it. When a message is
//! changed on purpose, `UPDATE_GOLDEN=1 cargo test --test config` writes the records anew: read the
//! difference before committing.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `EX_CONFIG` of sysexits.h.
const BROKEN: i32 = 78;

fn check(folder: &Path, file: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_plimsoll"))
        .args(["check", file])
        .current_dir(folder)
        .env_remove("PLIMSOLL_NO_SUCH_KEY")
        .env_remove("CREDENTIALS_DIRECTORY")
        .output()
        .expect("the binary runs")
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The names of the YAML files in `folder`, sorted.
fn yaml_files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the folder is there");
    let names =
        entries.map(|entry| entry.expect("it can be read").file_name().into_string().expect("it is ASCII"));
    let mut yaml: Vec<String> = names.filter(|name| name.ends_with(".yaml")).collect();
    yaml.sort();
    yaml
}

#[test]
fn a_broken_file_is_refused_in_the_words_on_record() {
    let folder = folder("tests/config");
    let files = yaml_files(&folder);
    assert!(files.len() >= 10, "only {files:?}");
    let mut changed = Vec::new();
    for file in &files {
        let output = check(&folder, file);
        assert_eq!(output.status.code(), Some(BROKEN), "{file}: {output:?}");
        assert!(output.stdout.is_empty(), "{file}: problems belong on stderr");
        let said = String::from_utf8(output.stderr).expect("messages are UTF-8");
        let record = folder.join(file).with_extension("txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&record, &said).expect("the record can be written");
        }
        let recorded = std::fs::read_to_string(&record).unwrap_or_default();
        if said.trim_end() != recorded.trim_end() {
            changed.push(format!("{file} now says:\n{said}"));
        }
    }
    assert!(changed.is_empty(), "UPDATE_GOLDEN=1 writes the records anew\n\n{}", changed.join("\n"));
}

#[test]
fn every_file_in_conf_is_sound() {
    let scratch = std::env::temp_dir().join(format!("plimsoll-conf-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("a scratch folder");
    let made = rcgen::generate_simple_self_signed(["llm.example.com".to_owned()]).expect("a certificate");
    for (name, pem) in [("cert.pem", made.cert.pem()), ("key.pem", made.signing_key.serialize_pem())] {
        std::fs::write(scratch.join(name), pem).expect("a certificate and its key");
        std::fs::set_permissions(scratch.join(name), Permissions::from_mode(0o600)).expect("a file of ours");
    }
    let files = yaml_files(&folder("conf"));
    for file in ["minimal.yaml", "reference.yaml", "from-nginx.yaml"] {
        assert!(files.iter().any(|name| name == file), "{file} is gone");
    }
    // Alert rules are for Prometheus.
    for file in files.iter().filter(|file| !file.starts_with("alerts")) {
        let text = std::fs::read_to_string(folder("conf").join(file)).expect("it can be read");
        std::fs::write(scratch.join(file), text.replace(": /etc/plimsoll/", ": ")).expect("a copy");
        let output = check(&scratch, file);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{file}:\n{said}");
        let confirmed = String::from_utf8_lossy(&output.stdout);
        assert!(confirmed.starts_with(&format!("{file}: ok")), "{file}: {confirmed}");
    }
    std::fs::remove_dir_all(&scratch).expect("the scratch folder goes");
}

#[test]
fn the_nginx_file_holds_every_line_of_the_original() {
    let text = std::fs::read_to_string(folder("conf/from-nginx.yaml")).expect("it can be read");
    let original = [
        "upstream llm {",
        "least_conn;",
        "server 10.0.0.1:8000 max_fails=3 fail_timeout=30s weight=1;",
        "server 10.0.0.4:8000 max_fails=3 fail_timeout=30s weight=1;",
        "keepalive 100;",
        "keepalive_requests 1000;",
        "keepalive_timeout 60s;",
        "listen 443 ssl http2;",
        "server_name llm.example.com;",
        "ssl_certificate /etc/plimsoll/cert.pem;",
        "ssl_certificate_key /etc/plimsoll/key.pem;",
        "location /v1/ {",
        "proxy_pass http://llm;",
        "proxy_http_version 1.1;",
        "proxy_set_header Connection \"\";",
        "proxy_set_header Host $host;",
        "proxy_connect_timeout 5s;",
        "proxy_read_timeout 600s;",
        "proxy_send_timeout 600s;",
        "proxy_buffering off;",
        "proxy_next_upstream error timeout http_500 http_502 http_503;",
        "proxy_next_upstream_tries 2;",
        "proxy_next_upstream_timeout 10s;",
        "location /health",
    ];
    for line in original {
        assert!(text.contains(&format!("# nginx: {line}")), "`{line}` is not translated");
    }
}

#[test]
fn a_credential_of_systemd_is_found_by_its_name() {
    let scratch = std::env::temp_dir().join(format!("plimsoll-credential-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("a scratch folder");
    let text = "listeners: [{address: 127.0.0.1:8080}]\nkeys: {team-a: {credential: team-a}}\n\
                upstreams: {u: {backends: [127.0.0.1:8000], api_key: {credential: engine}}}";
    std::fs::write(scratch.join("plimsoll.yaml"), text).expect("it can be written");
    std::fs::write(scratch.join("team-a"), "sk-canary-a\n").expect("it can be written");
    std::fs::set_permissions(scratch.join("team-a"), Permissions::from_mode(0o400)).expect("ours");
    let check = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command.arg("check").arg(scratch.join("plimsoll.yaml")).env("CREDENTIALS_DIRECTORY", &scratch);
        command.output().expect("the binary runs")
    };
    let without = check();
    let said = String::from_utf8_lossy(&without.stderr);
    assert_eq!(without.status.code(), Some(BROKEN), "{said}");
    assert!(said.contains("cannot read") && said.contains("/engine`") && !said.contains("team-a`"), "{said}");
    std::fs::write(scratch.join("engine"), "sk-canary-b\n").expect("it can be written");
    std::fs::set_permissions(scratch.join("engine"), Permissions::from_mode(0o400)).expect("ours");
    let with = check();
    assert_eq!(with.status.code(), Some(0), "{with:?}");
    std::fs::remove_dir_all(&scratch).expect("the scratch folder goes");
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let output = check(&folder("conf"), "absent.yaml");
    assert_eq!(output.status.code(), Some(BROKEN));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("--> absent.yaml"), "{said}");
}

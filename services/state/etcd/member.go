package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"

	"krgimage/services/state"
)

// MemberConfig is what Embedded works from.
type MemberConfig struct {
	Dir       string // of the member's data; made with mode 0700
	Namespace string // before every key
	Log       *slog.Logger

	// The members of several heads: name to URL, https://ADDRESS:PORT. Empty: this
	// one is alone and listens nowhere.
	Heads map[string]string
	Name  string // this one's name in Heads
	Files Files  // of this head, for both directions; needed with Heads
}

// A cluster's state is a few hundred kilobytes and changes some times a minute.
// These keep the member as small.
const (
	quota         = 256 << 20 // bytes of the database; then it takes no more writes
	segment       = 4 << 20   // bytes of a file of the log; etcd's own is 64 MiB
	snapshotEvery = 2000      // transactions
	catchUp       = 500       // transactions kept for a member that was away
	history       = "5000"    // revisions kept for watches
	tick          = 100       // milliseconds
	election      = 1000      // milliseconds without a leader
)

// alone is the name and the URL of a single member. Nothing listens there; the
// member's identity is made of it.
const (
	alone    = "head"
	aloneURL = "http://127.0.0.1:2380"
)

// setSegment is a setting of etcd's package, so it is made once.
var setSegment = sync.OnceFunc(func() { wal.SegmentSizeBytes = segment })

// DirError says that a member's directory can't be used. It is left as it was.
type DirError struct {
	Dir string
	Err error
}

func (e *DirError) Error() string {
	return fmt.Sprintf("state store %s: %v\n"+
		"It was left as it is. Bring the directory back from a backup. Without one: stop the head, move the directory away, start the head, and reboot every node", e.Dir, e.Err)
}

func (e *DirError) Unwrap() error { return e.Err }

// Embedded starts a member in this process and waits until it is ready: at once
// if it is alone, else until most of the heads are there. ctx bounds the wait,
// not the member's life.
func Embedded(ctx context.Context, cfg MemberConfig) (*Store, error) {
	setSegment()
	log := logger(cfg.Log)
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("state store: %w", err)
	}
	if err := cfg.remember(); err != nil {
		return nil, &DirError{cfg.Dir, err}
	}
	config, err := cfg.embed(log)
	if err != nil {
		return nil, fmt.Errorf("state store: %w", err)
	}
	member, err := start(cfg.Dir, config, log)
	if err != nil {
		return nil, err
	}
	release := func() { closeMember(member, log) }
	select {
	case <-member.Server.ReadyNotify():
	case <-log.fatal:
		release()
		return nil, &DirError{cfg.Dir, log.err()}
	case err := <-member.Err():
		release()
		return nil, fmt.Errorf("state store %s: %w", cfg.Dir, err)
	case <-ctx.Done():
		release()
		if len(cfg.Heads) > 1 {
			return nil, fmt.Errorf("state store: most of the heads (%s) must run before one can serve: %w", strings.Join(slices.Sorted(maps.Keys(cfg.Heads)), ", "), ctx.Err())
		}
		return nil, fmt.Errorf("state store: %w", ctx.Err())
	}
	if err := cfg.ready(); err != nil {
		release()
		return nil, fmt.Errorf("state store: %w", err)
	}
	s := newStore(v3client.New(member.Server), cfg.Namespace, release)
	s.failed, s.reason = log.fatal, func() error {
		if err := log.err(); err != nil {
			return fmt.Errorf("state store %s stopped (is the disk full or broken?): %w", cfg.Dir, err)
		}
		return nil
	}
	return s, nil
}

// closeMember stops a member; one that failed may not stop by itself, and is
// left to the end of the process then.
func closeMember(member *embed.Etcd, log *slogger) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		member.Close()
	}()
	select {
	case <-done:
	case <-log.fatal:
		select {
		case <-done:
		case <-time.After(2 * time.Second):
		}
	}
}

// start starts the member. etcd's answers to damage, which are to panic or to end
// the process, become errors here.
func start(dir string, config *embed.Config, log *slogger) (*embed.Etcd, error) {
	type result struct {
		member *embed.Etcd
		err    error
	}
	done := make(chan result, 1)
	go func() {
		r := result{err: errors.New("etcd gave up")}
		defer func() {
			if p := recover(); p != nil {
				r = result{err: fmt.Errorf("etcd can't read its data: %v", p)}
			}
			if r.err != nil && log.err() != nil {
				r.err = log.err()
			}
			done <- r
		}()
		// Reading a database that was cut short is a fault of the memory map.
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		if err := checkDatabase(filepath.Join(dir, "member", "snap", "db")); err != nil {
			r.err = err
			return
		}
		member, err := embed.StartEtcd(config)
		r = result{member, err}
	}()
	r := <-done
	if r.err != nil {
		return nil, &DirError{dir, r.err}
	}
	return r.member, nil
}

// checkDatabase reads every page of the database, before etcd finds the damage in
// a place where it can't say so.
func checkDatabase(path string) error {
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil && info.Size() == 0:
		return errors.New("the database is damaged: its file is empty")
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: 5 * time.Second})
	if errors.Is(err, bbolterrors.ErrTimeout) {
		return errors.New("another process uses it")
	}
	if err != nil {
		return fmt.Errorf("the database is damaged: %w", err)
	}
	defer db.Close()
	return db.View(func(tx *bbolt.Tx) error {
		if info, err := os.Stat(path); err != nil || info.Size() < tx.Size() {
			return fmt.Errorf("the database is damaged: its file is shorter than its %d bytes", tx.Size())
		}
		// Not by tx.Check: it reads in a goroutine of its own, where a fault or a
		// panic over a damaged page can't be caught.
		return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error { return walk(b, 0) })
	})
}

// walk reads all of a bucket.
func walk(b *bbolt.Bucket, depth int) error {
	var sum byte
	return b.ForEach(func(k, v []byte) error {
		if v == nil && depth < 16 {
			if inner := b.Bucket(k); inner != nil {
				return walk(inner, depth+1)
			}
		}
		for _, data := range [][]byte{k, v} {
			for _, c := range data {
				sum ^= c
			}
		}
		return nil
	})
}

// membership is the file that says what the member was made as: a directory can't
// be used for another set of heads.
type membership struct {
	Name  string            `json:"name"`
	Heads map[string]string `json:"heads"`
	Ready bool              `json:"ready"` // the member was ready once: there are data to lose
}

const membershipFile = "krg.json"

func (c MemberConfig) membership() membership {
	if len(c.Heads) > 0 {
		return membership{Name: c.Name, Heads: c.Heads}
	}
	return membership{Name: alone, Heads: map[string]string{alone: aloneURL}}
}

// remember compares the configuration with what the directory was made for, and
// clears what a first start left behind that never came to an end.
func (c MemberConfig) remember() error {
	have, want := membership{}, c.membership()
	data := filepath.Join(c.Dir, "member")
	text, err := os.ReadFile(filepath.Join(c.Dir, membershipFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(data); err == nil {
			return fmt.Errorf("%s is missing beside the data", membershipFile)
		}
		return c.note(want)
	case err != nil:
		return err
	}
	if err := json.Unmarshal(text, &have); err != nil {
		return fmt.Errorf("%s: %w", membershipFile, err)
	}
	want.Ready = have.Ready
	if !reflect.DeepEqual(have, want) {
		return fmt.Errorf("it was made for head %q of %v, the configuration (cluster.store) says head %q of %v", have.Name, have.Heads, want.Name, want.Heads)
	}
	if !have.Ready {
		return os.RemoveAll(data)
	}
	logs, err := filepath.Glob(filepath.Join(data, "wal", "*.wal"))
	if err != nil {
		return err
	}
	if len(logs) == 0 {
		return errors.New("the log (member/wal) is missing")
	}
	return nil
}

// ready notes that there are data from now on.
func (c MemberConfig) ready() error {
	m := c.membership()
	m.Ready = true
	return c.note(m)
}

func (c MemberConfig) note(m membership) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	path := filepath.Join(c.Dir, membershipFile)
	if old, err := os.ReadFile(path); err == nil && string(old) == string(text) {
		return nil
	}
	if err := renameio.WriteFile(path, text, 0o600); err != nil { // syncs the file, not the name
		return err
	}
	d, err := os.Open(c.Dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// embed is the configuration of the member.
func (c MemberConfig) embed(log *slogger) (*embed.Config, error) {
	e := embed.NewConfig()
	e.Dir = c.Dir
	e.ZapLoggerBuilder = func(cfg *embed.Config) error { return embed.NewZapLoggerBuilder(log.zap())(cfg) }
	e.LogLevel = "info"
	e.TickMs, e.ElectionMs = tick, election
	e.QuotaBackendBytes = quota
	e.SnapshotCount, e.SnapshotCatchUpEntries = snapshotEvery, catchUp
	e.MaxSnapFiles, e.MaxWalFiles = 2, 2
	e.AutoCompactionMode, e.AutoCompactionRetention = embed.CompactorModeRevision, history
	e.MaxTxnOps = state.MaxOps
	e.MaxRequestBytes = 2 << 20
	e.EnablePprof, e.EnableGRPCGateway = false, false
	e.ListenClientUrls, e.ListenClientHttpUrls, e.ListenMetricsUrls = nil, nil, nil
	e.AdvertiseClientUrls = nil
	e.InitialClusterToken = "krgimage"
	e.TlsMinVersion = "TLS1.3"

	heads := c.Heads
	e.Name, e.ListenPeerUrls = alone, nil
	if len(heads) == 0 {
		heads = map[string]string{alone: aloneURL}
	} else {
		e.Name = c.Name
	}
	own, err := url.Parse(heads[e.Name])
	if err != nil || own.Host == "" {
		return nil, fmt.Errorf("head %q is not one of the heads, or its URL %q is none", e.Name, heads[e.Name])
	}
	e.AdvertisePeerUrls = []url.URL{*own}
	if len(c.Heads) > 0 {
		e.ListenPeerUrls = []url.URL{*own}
		e.PeerTLSInfo = transport.TLSInfo{
			TrustedCAFile: c.Files.CA, CertFile: c.Files.Cert, KeyFile: c.Files.Key, ClientCertAuth: true,
		}
		for name, u := range c.Heads {
			if !strings.HasPrefix(u, "https://") {
				return nil, fmt.Errorf("head %q: %s is not an https URL", name, u)
			}
		}
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(heads)) {
		list = append(list, name+"="+heads[name])
	}
	e.InitialCluster = strings.Join(list, ",")
	return e, nil
}

package nodes

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"krgimage/configs"
)

const (
	macA = configs.MAC("52:54:00:00:00:0a")
	macB = configs.MAC("52:54:00:00:00:0b")
	macC = configs.MAC("52:54:00:00:00:0c")
)

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

func (c *clock) Now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.now }

func (c *clock) pass(d time.Duration) { c.mu.Lock(); c.now = c.now.Add(d); c.mu.Unlock() }

func cluster(change ...func(*configs.Cluster)) configs.Cluster {
	c := configs.Default()
	c.Network.Head = netip.MustParseAddr("10.77.0.254")
	for _, f := range change {
		f(&c)
	}
	return c
}

func ids(s ...string) func(*configs.Cluster) {
	return func(c *configs.Cluster) { c.Nodes.IDs = s }
}

func row(mac configs.MAC, id int) func(*configs.Cluster) {
	return func(c *configs.Cluster) { c.Nodes.Table = append(c.Nodes.Table, configs.Node{MAC: mac, ID: id}) }
}

func refuse(c *configs.Cluster) { c.Nodes.Unknown = "refuse" }

func open(t *testing.T, file string, c configs.Cluster, log *strings.Builder) *Registry {
	t.Helper()
	cfg := Config{Cluster: c, File: file, Now: newClock().Now}
	if log != nil {
		cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	}
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func assign(t *testing.T, r *Registry, mac configs.MAC, want int) Node {
	t.Helper()
	n, err := r.Assign(mac)
	if err != nil {
		t.Fatalf("Assign(%s): %v", mac, err)
	}
	if n.ID != want {
		t.Fatalf("Assign(%s) gave id %d, want %d", mac, n.ID, want)
	}
	return n
}

func TestDiscoveryTakesTheLowestFreeID(t *testing.T) {
	// .1 is the gateway's, .3 belongs to node 9 of the table, .0 is the subnet's.
	r := open(t, filepath.Join(t.TempDir(), "n.json"), cluster(ids("0-4", "254"), func(c *configs.Cluster) {
		c.Network.Gateway = netip.MustParseAddr("10.77.0.1")
		c.Nodes.Table = []configs.Node{{MAC: macC, ID: 9, Address: netip.MustParseAddr("10.77.0.3"), Hostname: "nine"}}
	}), nil)
	n := assign(t, r, macA, 2)
	if n.Hostname != "krg-2" || n.Address != netip.MustParseAddr("10.77.0.2") || n.Source != Discovered {
		t.Errorf("discovered %+v", n)
	}
	assign(t, r, macB, 4)
	assign(t, r, macA, 2)
	if n := assign(t, r, macC, 9); n.Hostname != "nine" || n.Source != FromTable {
		t.Errorf("row of the table became %+v", n)
	}
	if _, err := r.Assign("52:54:00:00:00:ff"); !errors.Is(err, ErrNoFreeID) { // 254 is the head's
		t.Errorf("with no id left: %v", err)
	}
}

func TestRestartKeepsIDs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "head", "nodes.json")
	r := open(t, file, cluster(), nil)
	assign(t, r, macB, 1)
	assign(t, r, macA, 2)
	r.Leased(macA, r.now().Add(time.Hour))

	r = open(t, file, cluster(), nil) // as after a kill: nothing was closed
	assign(t, r, macA, 2)
	assign(t, r, macC, 3)
	if n, ok := r.ByAddress(netip.MustParseAddr("10.77.0.2")); !ok || n.MAC != macA {
		t.Errorf("the lease is forgotten: %+v %v", n, ok)
	}
	if _, ok := r.ByAddress(netip.MustParseAddr("10.77.0.1")); ok {
		t.Error("an address that was never leased has an owner")
	}
}

func TestTableWins(t *testing.T) {
	file := filepath.Join(t.TempDir(), "n.json")
	r := open(t, file, cluster(), nil)
	assign(t, r, macA, 1)
	assign(t, r, macB, 2)

	var log strings.Builder
	r = open(t, file, cluster(row(macC, 1), row(macB, 7)), &log)
	if _, ok := r.Lookup(macA); ok {
		t.Error("the loser still has an entry")
	}
	if n, ok := r.Lookup(macB); !ok || n.ID != 7 {
		t.Errorf("a discovered machine that the table names: %+v", n)
	}
	for _, want := range []string{"gives id 1 with address 10.77.0.1 to " + string(macC), "its earlier id 2 is free again"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, &log)
		}
	}
	assign(t, r, macA, 2)
}

func TestSubnetChange(t *testing.T) {
	file := filepath.Join(t.TempDir(), "n.json")
	assign(t, open(t, file, cluster(ids("30")), nil), macA, 30)
	r := open(t, file, cluster(ids("2-5"), func(c *configs.Cluster) {
		c.Network.Subnet = netip.MustParsePrefix("10.9.0.0/29")
		c.Network.Head = netip.MustParseAddr("10.9.0.6")
	}), nil)
	if n := assign(t, r, macA, 2); n.Address != netip.MustParseAddr("10.9.0.2") {
		t.Errorf("address %s", n.Address)
	}
}

func TestRefusePolicy(t *testing.T) {
	file := filepath.Join(t.TempDir(), "n.json")
	r := open(t, file, cluster(ids("5")), nil)
	assign(t, r, macA, 5)
	r.Leased(macA, r.now())

	r = open(t, file, cluster(refuse, row(macB, 3)), nil)
	assign(t, r, macB, 3)
	for _, mac := range []configs.MAC{macA, macC} {
		if _, err := r.Assign(mac); !errors.Is(err, ErrRefused) {
			t.Errorf("Assign(%s) with refuse: %v", mac, err)
		}
	}
	if _, ok := r.ByAddress(netip.MustParseAddr("10.77.0.5")); ok {
		t.Error("a refused machine is known by its address")
	}
	assign(t, open(t, file, cluster(), nil), macA, 5) // kept for the day the policy changes back
}

func TestTableWithTwoOwners(t *testing.T) {
	for name, c := range map[string]configs.Cluster{
		"MAC": cluster(row(macA, 1), row(macA, 2)),
		"id":  cluster(row(macA, 1), row(macB, 1)),
	} {
		if _, err := Open(Config{Cluster: c, File: filepath.Join(t.TempDir(), "n.json")}); err == nil || !strings.Contains(err.Error(), "nodes.table[1]") {
			t.Errorf("%s listed twice: %v", name, err)
		}
	}
}

func TestUnusableFileIsKept(t *testing.T) {
	for name, content := range map[string]string{
		"empty":     "",
		"cut":       `{"format":1,"nodes":[{"mac":"52:54:00:00:00:0a","id":1`,
		"trailing":  `{"format":1,"nodes":[]} {}`,
		"later":     `{"format":3,"nodes":[]}`,
		"bad MAC":   `{"format":1,"nodes":[{"mac":"52-54","id":1}]}`,
		"two ids":   `{"format":1,"nodes":[{"mac":"52:54:00:00:00:0a","id":1},{"mac":"52:54:00:00:00:0b","id":1}]}`,
		"two MACs":  `{"format":1,"nodes":[{"mac":"52:54:00:00:00:0a","id":1},{"mac":"52:54:00:00:00:0a","id":2}]}`,
		"id 256":    `{"format":1,"nodes":[{"mac":"52:54:00:00:00:0a","id":256}]}`,
		"null byte": "\x00",
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "nodes.json")
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(Config{Cluster: cluster(), File: file})
			var bad *FileError
			if !errors.As(err, &bad) || !strings.Contains(err.Error(), file) {
				t.Fatalf("error %v does not name the file", err)
			}
			if after, _ := os.ReadFile(file); string(after) != content {
				t.Errorf("the file was changed to %q", after)
			}
		})
	}
}

func TestNoIDWithoutDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "head")
	r := open(t, filepath.Join(dir, "n.json"), cluster(), nil)
	// A file where the directory was: also root can't write there.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Assign(macA); err == nil || !strings.Contains(err.Error(), "n.json") {
		t.Fatalf("Assign = %+v, %v", n, err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	assign(t, r, macB, 1) // the id was not lost either
}

func TestConcurrentAssign(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "n.json"), cluster(), nil)
	var group sync.WaitGroup
	for i := range 40 {
		group.Go(func() {
			mac := configs.MAC("52:54:00:00:01:0" + string("0123456789"[i%10]))
			if _, err := r.Assign(mac); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	seen := map[int]bool{}
	for _, n := range r.Snapshot() {
		if seen[n.ID] {
			t.Errorf("id %d has two owners", n.ID)
		}
		seen[n.ID] = true
	}
	if len(seen) != 10 {
		t.Errorf("%d machines, want 10", len(seen))
	}
}

func TestRunWritesAtTheEnd(t *testing.T) {
	file := filepath.Join(t.TempDir(), "n.json")
	r := open(t, file, cluster(), nil)
	assign(t, r, macA, 1)
	r.Saw(macA, StageLoader, "undionly.kpxe")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if s := open(t, file, cluster(), nil).Snapshot(); len(s) != 1 || s[0].Stage() != StageLoader {
		t.Errorf("after a restart: %+v", s)
	}
}

func TestWatch(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "n.json"), cluster(), nil)
	assign(t, r, macA, 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var seen []string
	for n := range r.Watch(ctx) {
		seen = append(seen, string(n.MAC)+" "+string(n.Stage()))
		switch len(seen) {
		case 1: // while the reader is busy: two changes of one machine, then another one
			r.Discovering(macA, true, "")
			r.Saw(macA, StageScript, "")
			assign(t, r, macB, 2)
			continue
		case 3:
		default:
			continue
		}
		break
	}
	want := []string{string(macA) + " ", string(macA) + " script", string(macB) + " "}
	if strings.Join(seen, ",") != strings.Join(want, ",") {
		t.Errorf("watched %q, want %q", seen, want)
	}
	if len(r.watchers) != 0 {
		t.Error("a watcher that stopped is still served")
	}
}

func FuzzParseFile(f *testing.F) {
	f.Add([]byte(`{"format":1,"nodes":[{"mac":"52:54:00:00:00:0a","id":1,"boot":{"events":[{"stage":"dhcp"}]}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		kept, err := parse(data)
		if err != nil {
			return
		}
		file := filepath.Join(t.TempDir(), "n.json")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := Open(Config{Cluster: cluster(), File: file})
		if err != nil {
			t.Fatalf("%d machines: %v", len(kept), err)
		}
		if _, err := r.Assign("02:00:00:00:00:01"); err != nil && !errors.Is(err, ErrNoFreeID) {
			t.Error(err)
		}
	})
}

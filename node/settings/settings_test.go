package settings

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"krgimage/node/bootlog"
	"krgimage/node/cmdline"
	"krgimage/node/lease"
)

const answer = `{"session_id":1,"node_id":3,"hostname":"krg-3","domain":"krg","mac":"52:54:00:00:00:03","address":"10.77.0.3/24",
"head":"10.77.0.254","time":"2026-01-02T03:04:05.678901234Z","nfs":{"server":"10.77.0.254","port":2049,"path":"/"},"rescue_shell":true,"later":"ignored"}`

func good() Settings {
	return Settings{
		SessionID: 1, NodeID: 3, Hostname: "krg-3", Domain: "krg", MAC: "52:54:00:00:00:03",
		Address: netip.MustParsePrefix("10.77.0.3/24"), Head: netip.MustParseAddr("10.77.0.254"),
		Time: time.Date(2026, 1, 2, 3, 4, 5, 678901234, time.UTC),
		NFS:  NFS{Server: "10.77.0.254", Port: 2049, Path: "/"}, RescueShell: true,
	}
}

func TestDecode(t *testing.T) {
	got, err := Decode([]byte(answer))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(good(), got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("Decode (-want +got):\n%s", diff)
	}
	for old, bad := range map[string]string{
		`"session_id":1`:           `"session_id":0`,
		`"node_id":3`:              `"node_id":256`,
		`"hostname":"krg-3"`:       `"hostname":"krg 3"`,
		`"domain":"krg"`:           `"domain":"-krg"`,
		`"path":"/"`:               `"path":"srv"`,
		`"port":2049`:              `"port":70000`,
		`"server":"10.77.0.254"`:   `"server":"10.77.0.254,rw"`,
		`"address":"10.77.0.3/24"`: `"address":"10.77.0.3/99"`,
		`{`:                        `[`,
	} {
		text := strings.Replace(answer, old, bad, 1)
		if _, err := Decode([]byte(text)); err == nil || !strings.Contains(err.Error(), "node settings") {
			t.Errorf("with %s: error = %v", bad, err)
		}
	}
}

func TestHead(t *testing.T) {
	var posted []bootlog.Stage
	status, body := http.StatusOK, answer
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method + " " + r.URL.Path {
		case "POST /v1/node/stage":
			var s bootlog.Stage
			text, _ := io.ReadAll(r.Body)
			if err := json.Unmarshal(text, &s); err != nil {
				t.Error(err)
			}
			posted = append(posted, s)
		case "GET /v1/node":
		default:
			t.Errorf("unexpected %s %s", r.Method, r.URL.Path)
		}
		w.WriteHeader(status)
		if status != http.StatusNoContent {
			_, _ = io.WriteString(w, body)
		}
	}))
	defer server.Close()
	h, err := NewHead(server.URL + "/")
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if s, err := h.Fetch(ctx, ""); err != nil || s.NodeID != 3 {
		t.Errorf("Fetch = %+v, %v", s, err)
	}
	status = http.StatusNoContent
	want := bootlog.Stage{Name: bootlog.StageLink, UptimeMS: 1234, Detail: "eth0 1000 Mb/s"}
	if err := h.PostStage(ctx, want); err != nil || len(posted) != 1 || posted[0] != want {
		t.Errorf("PostStage: %v, head got %v", err, posted)
	}
	for _, tc := range []struct {
		status          int
		fetch           error // nil: any error that is none of the sentinels
		stageIsRejected bool
	}{
		{http.StatusForbidden, ErrRefused, true},
		{http.StatusNotFound, ErrNoInterface, true},
		{http.StatusMethodNotAllowed, ErrNoInterface, true},
		{http.StatusBadRequest, bootlog.ErrRejected, true},
		{http.StatusServiceUnavailable, nil, false},
	} {
		status, body = tc.status, "because\nof this"
		_, err := h.Fetch(ctx, "")
		if err == nil || tc.fetch != nil && !errors.Is(err, tc.fetch) {
			t.Errorf("%d: Fetch = %v, want %v", tc.status, err, tc.fetch)
		}
		if tc.fetch == nil && (errors.Is(err, ErrRefused) || errors.Is(err, ErrNoInterface)) {
			t.Errorf("%d: Fetch = %v, want a passing error", tc.status, err)
		}
		if err := h.PostStage(ctx, want); err == nil || errors.Is(err, bootlog.ErrRejected) != tc.stageIsRejected {
			t.Errorf("%d: PostStage = %v", tc.status, err)
		}
	}
	for _, bad := range []string{"", "10.0.0.1:80", "https://10.0.0.1", "http://", "ftp://x"} {
		if _, err := NewHead(bad); err == nil {
			t.Errorf("NewHead(%q) accepted", bad)
		}
	}
}

func TestHandoverSurvivesSaving(t *testing.T) {
	s := good()
	want := Handover{
		Identity: cmdline.Identity{SessionID: 1, NodeID: 3}, Hostname: "krg-3",
		Lease: lease.Lease{Interface: "eth0", Address: s.Address, Server: s.Head, Lifetime: time.Hour},
		NFS:   "10.77.0.254:/", Image: Image{Name: "krg", Version: "1", KrgSHA256: "00"},
		Settings: &s, Received: 5 * time.Second, Pending: []bootlog.Stage{{Name: "link", UptimeMS: 7}},
	}
	dir := t.TempDir()
	if err := want.Save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := LoadHandover(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("handover (-want +got):\n%s", diff)
	}
	if fi, err := os.Stat(dir + "/settings.json"); err != nil || fi.Mode().Perm() != 0o644 {
		t.Errorf("settings.json: %v %v", fi, err)
	}
	if !want.RescueShell() {
		t.Error("rescue shell refused")
	}
	s.RescueShell = false
	if want.RescueShell() {
		t.Error("rescue shell offered against the head's word")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(answer))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := Decode(text)
		if err == nil && (s.SessionID < 1 || s.NodeID < 0 || s.NodeID > 255 || strings.ContainsAny(s.Hostname, "/ \n")) {
			t.Errorf("accepted %+v", s)
		}
	})
}

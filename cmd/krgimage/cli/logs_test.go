package cli

import (
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"krgimage/services/cluster/wire"
	"krgimage/services/logs"
)

func TestLogs(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "cluster.yaml")
	if err := os.WriteFile(config, []byte("name: krg\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	store, err := logs.Open(logsDir(trialDir(filepath.Join(dir, "state"))), time.Now, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for node, message := range map[int]string{1: "first", 2: "second"} {
		store.Add(node, &wire.LogBatch{Records: []*wire.LogRecord{
			{TimeUnixNano: time.Now().UnixNano(), Source: "krgd", Message: message},
			{TimeUnixNano: time.Now().UnixNano(), Source: "kernel", Level: int32(slog.LevelError), Message: message + " is broken"},
		}})
	}
	store.Close()
	for _, tc := range []struct {
		args     string
		code     int
		has, not string
	}{
		{"logs", 0, "node 2   kernel    ERROR second is broken\n", "\x1b"},
		{"logs 1", 0, "first", "second"},
		{"logs krg-1 --level error", 0, "first is broken", "krgd"},
		{"logs -n 1", 0, "is broken", "krgd"},
		{"logs --since 1h --json 2", 0, `"node":2,"level":"INFO","source":"krgd","message":"second"}`, "first"},
		{"logs --since 2999-01-01", 0, "", "first"},
		{"logs nobody", 2, `no node called "nobody"`, "first"},
		{"logs 300", 2, "node ids are 0 to 255", "first"},
		{"logs --since yesterday", 2, "--since", "first"},
		{"logs --level loud", 2, "want debug, info, warn or error", "first"},
	} {
		code, out, errs := krgimage(t, append([]string{"-c", config}, strings.Fields(tc.args)...)...)
		if code != tc.code || !strings.Contains(out+errs, tc.has) || strings.Contains(out, tc.not) {
			t.Errorf("krgimage %s: exit %d\n%s%s", tc.args, code, out, errs)
		}
	}
}

func TestParseSince(t *testing.T) {
	now := time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)
	for text, want := range map[string]string{
		"": "0001-01-01T00:00:00Z", "10m": "2026-05-06T06:58:09Z", "90s": "2026-05-06T07:06:39Z", "06:30": "2026-05-06T06:30:00Z",
		"2026-05-01": "2026-05-01T00:00:00Z", "2026-05-01 12:00": "2026-05-01T12:00:00Z", "2026-05-01T12:00:00+02:00": "2026-05-01T10:00:00Z",
	} {
		if got, err := parseSince(text, now); err != nil || got.UTC().Format(time.RFC3339) != want {
			t.Errorf("%q: %v, %v; want %s", text, got, err, want)
		}
	}
	for _, text := range []string{"x", "-5m", "25:00", "2026-13-01"} {
		if got, err := parseSince(text, now); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

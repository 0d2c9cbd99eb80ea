package nfs

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// TestMetrics: what clients do shows in the counters and in Prometheus form.
func TestMetrics(t *testing.T) {
	s, addr, _ := serve(t, Export{Path: "/", Dir: t.TempDir()})
	c := connect(t, addr, "/", 0, 0)
	c.create(c.root, "f", createGuarded, set{})
	c.create(c.root, "f", createGuarded, set{})
	c.getattr([]byte("0123456789012345678901234567890123456789"))
	c.getattr(c.root) // its answer comes after the others were counted

	st := s.Stats()
	if p := st.Procs["CREATE"]; p.Calls != 2 || p.Errors != 1 || p.Time <= 0 || p.In == 0 || p.Out == 0 {
		t.Errorf("CREATE: %+v", p)
	}
	if st.BadHandles != 1 || st.Open != 1 || st.Procs["MOUNT.MNT"].Calls != 1 {
		t.Errorf("%+v", st)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(s.Metrics())
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, f := range families {
		for _, m := range f.Metric {
			all.WriteString(f.GetName() + " " + strings.ReplaceAll(m.String(), "  ", " ") + "\n")
			if f.GetName() == "krgimage_nfs_duration_seconds" {
				h := m.GetHistogram()
				if last := h.Bucket[len(h.Bucket)-1]; h.GetSampleCount() == 0 || last.GetCumulativeCount() > h.GetSampleCount() {
					t.Errorf("histogram %v", m)
				}
			}
		}
	}
	for _, want := range []string{
		`krgimage_nfs_requests_total label:{name:"procedure" value:"CREATE"} label:{name:"program" value:"NFS"} counter:{value:2}`,
		`krgimage_nfs_errors_total label:{name:"procedure" value:"CREATE"} label:{name:"program" value:"NFS"} counter:{value:1}`,
		`krgimage_nfs_requests_total label:{name:"procedure" value:"MNT"} label:{name:"program" value:"MOUNT"} counter:{value:1}`,
		`krgimage_nfs_connections gauge:{value:1}`,
	} {
		if !strings.Contains(all.String(), want) {
			t.Errorf("no %s in\n%s", want, all.String())
		}
	}
}

func TestBuckets(t *testing.T) {
	for _, tt := range []struct {
		took   time.Duration
		bucket int
	}{
		{-time.Second, 0}, {0, 0}, {16383, 0}, {16384, 1}, {time.Millisecond, 6}, {time.Hour, buckets - 1},
	} {
		var p procCounters
		p.done(tt.took, 1, 2)
		for i := range p.took {
			want := uint64(0)
			if i == tt.bucket {
				want = 1
			}
			if got := p.took[i].Load(); got != want {
				t.Errorf("%v: %d calls in bucket %d, want %d", tt.took, got, i, want)
			}
		}
		if tt.bucket < buckets-1 && tt.took >= BucketBound(tt.bucket) {
			t.Errorf("%v is not below the bound %v of its bucket", tt.took, BucketBound(tt.bucket))
		}
	}
	p := ProcStats{Calls: 100, Buckets: append([]uint64{90, 0, 9, 1}, make([]uint64, buckets-4)...)}
	if got := p.Quantile(0.99); got != BucketBound(2) {
		t.Errorf("99%%: %v, want %v", got, BucketBound(2))
	}
}

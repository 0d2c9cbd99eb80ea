package nfs

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the server's counters in Prometheus form, read when they are
// gathered:
//
//	krgimage_nfs_requests_total{program,procedure}
//	krgimage_nfs_errors_total{program,procedure}          answers with another status than OK
//	krgimage_nfs_received_bytes_total{program,procedure}  arguments
//	krgimage_nfs_sent_bytes_total{program,procedure}      replies
//	krgimage_nfs_duration_seconds{program,procedure}      histogram: from the request read to the reply made
//	krgimage_nfs_connections, krgimage_nfs_open_files
//	krgimage_nfs_connections_total{result}                "accepted", "refused"
//	krgimage_nfs_replayed_total, krgimage_nfs_bad_records_total, krgimage_nfs_bad_arguments_total,
//	krgimage_nfs_bad_handles_total, krgimage_nfs_panics_total, krgimage_nfs_unknown_calls_total
//	krgimage_nfs_file_cache_total{result}                 "hit", "miss"
//
// What a Stats field counts is said there. Procedures that were never called are
// left out.
func (s *Server) Metrics() prometheus.Collector { return collector{s} }

type collector struct{ s *Server }

// metric describes a series of this server.
func metric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("krgimage_nfs_"+name, help, labels, nil)
}

// Describe sends nothing: the collector is an unchecked one, whose series depend
// on what clients call.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	st := c.s.Stats()
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v float64) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v)
	}
	requests := metric("requests_total", "Requests answered.", "program", "procedure")
	failures := metric("errors_total", "Answers with a status other than OK.", "program", "procedure")
	in := metric("received_bytes_total", "Bytes of arguments.", "program", "procedure")
	sent := metric("sent_bytes_total", "Bytes of replies.", "program", "procedure")
	duration := metric("duration_seconds", "From the request read to the reply made.", "program", "procedure")
	for name, p := range st.Procs {
		program, procedure := "NFS", name
		if rest, found := strings.CutPrefix(name, "MOUNT."); found {
			program, procedure = "MOUNT", rest
		}
		count(requests, p.Calls, program, procedure)
		count(failures, p.Errors, program, procedure)
		count(in, p.In, program, procedure)
		count(sent, p.Out, program, procedure)
		buckets := map[float64]uint64{}
		total := uint64(0)
		for i, n := range p.Buckets {
			total += n
			if i < len(p.Buckets)-1 {
				buckets[BucketBound(i).Seconds()] = total
			}
		}
		out <- prometheus.MustNewConstHistogram(duration, total, p.Time.Seconds(), buckets, program, procedure)
	}
	gauge(metric("connections", "Connections open."), float64(st.Open))
	gauge(metric("open_files", "Files held open."), float64(st.CachedFiles))
	connections := metric("connections_total", "Connections that were made.", "result")
	count(connections, st.Accepted, "accepted")
	count(connections, st.Refused, "refused")
	cache := metric("file_cache_total", "Files asked for, by whether they were open.", "result")
	count(cache, st.CacheHits, "hit")
	count(cache, st.CacheMisses, "miss")
	count(metric("replayed_total", "Repeated calls answered from memory."), st.Replayed)
	count(metric("bad_records_total", "Connections closed because of malformed RPC."), st.BadRecords)
	count(metric("bad_arguments_total", "Calls whose arguments could not be decoded."), st.Garbage)
	count(metric("bad_handles_total", "File handles that this server's key did not make."), st.BadHandles)
	count(metric("panics_total", "Calls that failed with an internal error."), st.Panics)
	count(metric("unknown_calls_total", "Calls of programs, versions or procedures not served."), st.Unknown)
}

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.ObjectReader;
import com.fasterxml.jackson.databind.ObjectWriter;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.KStream;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.processor.StateRestoreListener;
import org.apache.kafka.streams.state.KeyValueStore;

/** Kafka Streams: MODE map | table | table-eos. */
public class KStreamsBench {
    public static class Order {
        public long order_id;
        public String user;
        public double amount;
        public String country;
        public long ts;
    }

    public static class Out {
        public String user;
        public double total;

        public Out() {}

        public Out(String user, double total) {
            this.user = user;
            this.total = total;
        }
    }

    private static final ObjectMapper MAPPER = new ObjectMapper();

    private static <T> Serde<T> json(Class<T> type) {
        ObjectReader reader = MAPPER.readerFor(type);
        ObjectWriter writer = MAPPER.writerFor(type);
        return Serdes.serdeFrom(
            (topic, value) -> {
                try {
                    return value == null ? null : writer.writeValueAsBytes(value);
                } catch (IOException error) {
                    throw new UncheckedIOException(error);
                }
            },
            (topic, data) -> {
                try {
                    return data == null ? null : reader.readValue(data);
                } catch (IOException error) {
                    throw new UncheckedIOException(error);
                }
            });
    }

    private static Properties settings(Map<String, String> environment) {
        Properties settings = new Properties();
        settings.put("application.id", environment.get("APPID"));
        settings.put("bootstrap.servers", environment.get("BOOTSTRAP"));
        settings.put("state.dir", environment.get("DATADIR"));
        settings.put("auto.offset.reset", "earliest");
        settings.put("num.stream.threads", environment.getOrDefault("THREADS", "1"));
        settings.put(
            "processing.guarantee", environment.get("MODE").endsWith("eos") ? "exactly_once_v2" : "at_least_once");
        settings.put("statestore.cache.max.bytes", 0); // every update leaves, as with the other peers
        if (environment.containsKey("SESSION_MS")) { // several workers share the work, and come and go
            settings.put("session.timeout.ms", environment.get("SESSION_MS"));
            settings.put("heartbeat.interval.ms", environment.get("HEARTBEAT_MS"));
            settings.put("probing.rebalance.interval.ms", 60_000); // the least it takes
            settings.put("num.standby.replicas", environment.getOrDefault("STANDBYS", "0"));
            settings.put("internal.leave.group.on.close", true); // else a stop is noticed when the session ends
        }
        return settings;
    }

    private static class TellRestored implements StateRestoreListener {
        @Override
        public void onRestoreStart(TopicPartition partition, String store, long start, long end) {}

        @Override
        public void onBatchRestored(TopicPartition partition, String store, long end, long records) {}

        @Override
        public void onRestoreEnd(TopicPartition partition, String store, long records) {
            System.out.println("restored " + records + " records");
        }
    }

    public static void main(String[] arguments) {
        Map<String, String> environment = System.getenv();
        StreamsBuilder builder = new StreamsBuilder();
        KStream<String, Order> orders =
            builder.stream(environment.get("IN"), Consumed.with(Serdes.String(), json(Order.class)));
        KStream<String, Out> results =
            environment.get("MODE").equals("map")
                ? orders.mapValues(order -> new Out(order.user, order.amount * 2))
                : orders
                    .groupByKey(Grouped.with(Serdes.String(), json(Order.class)))
                    .aggregate(
                        () -> 0.0,
                        (user, order, total) -> total + order.amount,
                        Materialized.<String, Double, KeyValueStore<Bytes, byte[]>>as("totals")
                            .withKeySerde(Serdes.String())
                            .withValueSerde(Serdes.Double()))
                    .toStream()
                    .mapValues((user, total) -> new Out(user, total));
        results.to(environment.get("OUT"), Produced.with(Serdes.String(), json(Out.class)));
        KafkaStreams streams = new KafkaStreams(builder.build(), settings(environment));
        streams.setGlobalStateRestoreListener(new TellRestored());
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
    }
}
